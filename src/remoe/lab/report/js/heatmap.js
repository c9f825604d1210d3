"use strict";
// A map of numbers on a canvas: pointer, tap and arrow keys read its cells; a click, a tap or Enter selects one.
remoe.heatmap = (figure, options) => {
  const { element, colour, short } = remoe;
  const LEFT = 48, BOTTOM = 34, TICKS = 8;
  const HINT = "Point at a cell or tap it, or use the arrow keys.";
  let { rows, columns, value, max } = options;
  const holder = element("div", undefined, {
    class: "map", tabindex: 0, role: "group",
    "aria-label": `${figure.title}: arrow keys move between cells${options.choose ? ", Enter selects" : ""}`,
  });
  const canvas = element("canvas", undefined, { "aria-hidden": "true" });
  const readout = element("p", HINT, { class: "readout", "aria-live": "polite" });
  const scale = element("p", undefined, { class: "scale" });
  holder.append(canvas);
  figure.body.append(holder, scale, readout);
  let at = null, chosen = null, image = null;

  const strength = (number) => {
    if (!(number > 0)) return 0;
    return Math.min(1, options.linear ? number / max : Math.sqrt(number / max));
  };

  // Colours by 256 levels between the three of the theme
  function palette() {
    const stops = ["map-low", "map-middle", "map-high"].map((name) => colour(name).split(",").map(Number));
    return remoe.range(256).map((level) => {
      const place = (level / 255) * 2;
      const from = Math.min(1, Math.floor(place));
      return stops[from].map((low, i) => Math.round(low + (place - from) * (stops[from + 1][i] - low)));
    });
  }

  function paint() {
    const colours = palette();
    image = document.createElement("canvas");
    image.width = columns;
    image.height = rows;
    const context = image.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    for (let row = 0, i = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, i += 4) {
        const [red, green, blue] = colours[Math.round(255 * strength(value(row, column)))];
        pixels.data.set([red, green, blue, 255], i);
      }
    }
    context.putImageData(pixels, 0, 0);
    const strip = remoe.range(33).map((i) => `rgb(${colours[Math.round(255 * strength((max * i) / 32))].join(",")})`);
    const bar = element("span", undefined, { class: "strip", "aria-hidden": "true" });
    bar.style.background = `linear-gradient(to right, ${strip.join(",")})`;
    const format = options.format || short;
    scale.replaceChildren(element("span", format(0)), bar, element("span", `${format(max)} ${options.unit || ""}`));
    draw();
  }

  function size() {
    const width = Math.max(160, document.documentElement.classList.contains("print") ? 640 : figure.body.clientWidth);
    const row = Math.max(3, Math.min(22, Math.floor(440 / rows)));
    return { width, height: rows * row + BOTTOM, cell: (width - LEFT - 4) / columns, row };
  }

  function draw() {
    const { width, height, cell, row } = size();
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    const shown = Math.max(0, Math.min(columns, options.until ? options.until() : columns)); // the others are empty
    if (options.until) {
      context.fillStyle = colour("line");
      context.fillRect(LEFT, 0, cell * shown + 2, row * rows);
    }
    if (shown) context.drawImage(image, 0, 0, shown, rows, LEFT, 0, cell * shown, row * rows);
    context.fillStyle = colour("soft");
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(14 / row));
    for (let i = 0; i < rows; i += every) context.fillText(options.rowTick(i), LEFT - 5, (i + 0.5) * row, LEFT - 8);
    context.textAlign = "center";
    const step = Math.max(1, Math.ceil(columns / Math.min(TICKS * 2, Math.floor((width - LEFT) / 56))));
    for (let i = 0; i < columns; i += step) {
      context.fillText(options.columnTick(i), LEFT + (i + 0.5) * cell, rows * row + 9);
    }
    context.fillText(options.columnLabel, LEFT + (cell * columns) / 2, rows * row + 25);
    if (options.mark) {
      context.strokeStyle = colour("mark-line");
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          if (options.mark(r, c)) cross(context, LEFT + (c + 0.5) * cell, (r + 0.5) * row, Math.min(cell, row) / 3.5);
        }
      }
    }
    for (const [place, name] of [[chosen, "mark-line"], [at, "ink"]]) {
      if (!place) continue;
      context.strokeStyle = colour(name);
      context.lineWidth = 2;
      context.strokeRect(LEFT + place[1] * cell - 1, place[0] * row - 1, Math.max(3, cell) + 2, row + 2);
    }
  }

  function cross(context, x, y, half) {
    context.beginPath();
    context.moveTo(x - half, y - half);
    context.lineTo(x + half, y + half);
    context.moveTo(x + half, y - half);
    context.lineTo(x - half, y + half);
    context.stroke();
  }

  function point(row, column) {
    if (row < 0 || column < 0 || row >= rows || column >= columns) return;
    at = [row, column];
    readout.textContent = options.describe(row, column);
    draw();
  }

  function cellOf(event) {
    const { cell, row } = size();
    const box = canvas.getBoundingClientRect();
    return [Math.floor((event.clientY - box.top) / row), Math.floor((event.clientX - box.left - LEFT) / cell)];
  }

  const choose = () => at && options.choose && options.choose(...at);
  canvas.addEventListener("pointermove", (event) => point(...cellOf(event)));
  canvas.addEventListener("click", (event) => {
    point(...cellOf(event));
    choose();
  });
  holder.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;  // the browser's own
    const [down, right] = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    }[event.key] || [0, 0];
    if (event.key === "Enter" || event.key === " ") choose();
    else if (!down && !right) return;
    event.preventDefault();
    if (down || right) at ? point(at[0] + down, at[1] + right) : point(0, 0);
  });
  remoe.onTheme(paint);
  new ResizeObserver(() => image && draw()).observe(figure.body);
  paint();
  return {
    draw,
    set(changed) {
      ({ rows, columns, value, max } = { rows, columns, value, max, ...changed });
      at = null;
      readout.textContent = HINT;
      paint();
    },
    select(row, column) {
      chosen = [row, column];
      draw();
    },
  };
};
