"use strict";
// Curves and dots, drawn by uPlot: drag to enlarge, or by a button; pointer, tap or arrow keys to read.
(() => {
  const { element, colour, short } = remoe;
  const HEIGHT = 250;
  const COLOURS = ["line-1", "line-2", "line-3", "line-4", "line-5", "line-6"];
  const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3]];
  const BORDERS = ["solid", "dashed", "dotted", "double"]; // of the legend's squares, like the dashes of the curves

  // A series has a colour of its own, or, if there are more, its place between two
  function stroke(index, count) {
    if (count <= COLOURS.length) return () => colour(COLOURS[index]);
    const share = index / (count - 1);
    return () => {
      const [low, high] = [colour("map-middle"), colour("map-end")].map((text) => text.split(",").map(Number));
      return `rgb(${low.map((value, i) => Math.round(value + share * (high[i] - value))).join(",")})`;
    };
  }

  function clean(values, log) {
    return Array.from(values, (value) => (Number.isFinite(value) && (!log || value > 0) ? value : null));
  }

  // Shades the stages of training, and draws the target
  function background(u, options) {
    const { left, top, width, height } = u.bbox;
    const context = u.ctx;
    context.save();
    (options.stages || []).forEach(([first, last, name]) => {
      const from = Math.max(left, u.valToPos(first, "x", true));
      const to = Math.min(left + width, u.valToPos(last + 1, "x", true));
      if (!(to > from)) return;
      context.fillStyle = colour(`stage-${name}`);
      context.fillRect(from, top, to - from, height);
    });
    if (options.target !== null && options.target !== undefined) {
      const y = u.valToPos(options.target, "y", true);
      context.strokeStyle = colour("soft");
      context.setLineDash([6, 6]);
      context.beginPath();
      context.moveTo(left, y);
      context.lineTo(left + width, y);
      context.stroke();
    }
    context.restore();
  }

  // The powers of ten, at most eight, for a logarithmic axis
  function powers(u, number, low, high) {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const step = Math.ceil((last - first + 1) / 8);
    return remoe.range(Math.floor((last - first) / step) + 1).map((i) => 10 ** (first + i * step));
  }

  function axis(label, log, whole) {
    return {
      ...(log ? { splits: powers } : whole ? { incrs: remoe.range(24).map((i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3)) } : {}),
      label, stroke: () => colour("soft"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
      grid: { stroke: () => colour("line"), width: 1 }, ticks: { stroke: () => colour("line"), width: 1 },
      values: (u, splits) => splits.map((value) => (value === null ? "" : short(value))),
      size: (u, shown) => Math.max(48, 19 + 7 * Math.max(0, ...(shown || []).map((text) => text.length))), labelSize: 18,
    };
  }

  // The figure's curves. options: x, xName, names, values, unit, log, logX, fraction, stages, target, dots,
  // colours: the number of each series' colour, by default its own
  remoe.lines = (figure, options) => {
    const holder = element("div", undefined, {
      class: "lines", tabindex: 0, role: "group",
      "aria-label": `${figure.title}: left and right arrow keys read values, plus and minus enlarge, Escape shows all`,
    });
    figure.body.append(holder);
    let u = null, at = null, stale = false; // at: index of the value that was read last
    const seen = new IntersectionObserver((entries) => {
      if (stale && entries.at(-1).isIntersecting) make(); // others are drawn again when they are seen
    }, { rootMargin: "100px" });

    function make() {
      [stale, at] = [false, null];
      const x = Array.from(options.x, (value) => (options.logX && !(value > 0) ? null : value));
      const kept = x.map((value) => value !== null);
      const only = (values) => clean(values, options.log).filter((_, i) => kept[i]);
      const count = options.names.length;
      const colours = options.colours || remoe.range(count);
      const hues = options.colours ? COLOURS.length : count;
      const isDot = (i) => Boolean(options.dots && options.dots[i]);
      const pattern = (i) => (count > 1 && hues <= COLOURS.length && !isDot(i) ? colours[i] % DASHES.length : 0);
      if (u) u.destroy();
      u = new uPlot({
        width: width(), height: HEIGHT, ms: 1,
        scales: { x: { time: false, distr: options.logX ? 3 : 1 }, y: { distr: options.log ? 3 : 1, ...options.scaleY } },
        axes: [{ ...axis(options.xName, false, !options.fraction), size: 30 }, axis(options.unit, options.log)],
        legend: { live: true, markers: { width: (u, i) => (isDot(i - 1) ? 0 : 3), dash: (u, i) => BORDERS[pattern(i - 1)], fill: (u, i) => (isDot(i - 1) ? u.series[i].stroke(u, i) : null) } },
        cursor: { sync: options.sync ? { key: options.sync } : undefined, points: { size: 6 } },
        series: [
          { label: options.xName, value: (_, value) => short(value) },
          ...options.names.map((label, i) => ({
            label, stroke: stroke(colours[i], hues), width: hues > COLOURS.length ? 1 : 1.5, spanGaps: true, value: (_, value) => short(value),
            dash: DASHES[pattern(i)],
            ...(isDot(i) ? { paths: () => null, points: { show: true, size: 4 } } : { points: { show: false } }),
          })),
        ],
        hooks: { drawClear: [(made) => background(made, options)], setCursor: [({ cursor }) => (at = cursor.idx ?? at)] },
      }, [x.filter((value) => value !== null), ...options.values.map(only)], holder);
    }

    function width() {
      return Math.max(160, document.documentElement.classList.contains("print") ? 640 : figure.body.clientWidth);
    }

    function read(step) {
      const last = u.data[0].length - 1;
      at = Math.max(0, Math.min(last, (at ?? 0) + step));
      u.setCursor({ left: u.valToPos(u.data[0][at], "x"), top: u.over.clientHeight / 2 });
    }

    function zoom(factor) {
      const { min, max } = u.scales.x;
      const middle = at === null ? (min + max) / 2 : u.data[0][at];
      u.setScale("x", {
        min: Math.max(u.data[0][0], middle - (middle - min) * factor),
        max: Math.min(u.data[0].at(-1), middle + (max - middle) * factor),
      });
    }

    const whole = () => u.setScale("x", { min: u.data[0][0], max: u.data[0].at(-1) });
    holder.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;  // the browser's own
      const far = event.shiftKey ? 20 : 1;
      const action = {
        ArrowLeft: () => read(-far), ArrowRight: () => read(far), Home: () => read(-Infinity), End: () => read(Infinity),
        "+": () => zoom(0.5), "-": () => zoom(2), Escape: whole,
      }[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    });
    const button = (text, label, act) => {
      const made = element("button", text, { type: "button", "aria-label": `${figure.title}: ${label}` });
      made.addEventListener("click", act);
      return made;
    };
    figure.tools.prepend(button("Enlarge", "enlarge around the value that is read", () => zoom(0.5)), button("Show all", "show the whole range", whole));
    make();
    const resize = () => u.setSize({ width: width(), height: HEIGHT });
    const resized = new ResizeObserver(resize);
    resized.observe(figure.body);
    const forget = remoe.onTheme(() => {
      if (stale) make();
      resize();
      u.redraw();
    });
    return {
      set(changed) {
        Object.assign(options, changed);
        stale = true;
        seen.unobserve(holder);
        seen.observe(holder);
      },
      destroy() {
        forget();
        resized.disconnect();
        seen.disconnect();
        u.destroy();
        holder.remove();
      },
    };
  };
})();
