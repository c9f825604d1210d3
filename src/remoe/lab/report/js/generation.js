"use strict";
// A prompt and what the model wrote after it: the tokens as they were written, and the map of experts filling up.
(() => {
  const found = remoe.data.generation;
  if (!found) return;
  const { data, unpack, element, range, short, percent, visible, choice } = remoe;
  const { layers, experts } = data.head;
  const { tokens, prompt } = found;
  const T = tokens.length;
  const counts = unpack(found.counts), expert = unpack(found.expert), gate = unpack(found.gate), loss = unpack(found.loss);
  const read = T - 1; // the last token was written, and not read any more
  const start = new Uint32Array(layers * read + 1);
  for (let i = 0; i < counts.length; i++) start[i + 1] = start[i] + counts[i];
  const COLUMNS = 256, HALF = COLUMNS / 2; // of the map: a longer text moves through it by halves
  const SHOWN = 1500; // tokens of the text that are in the page
  const ALL = -1;
  const state = { step: T, layer: ALL, colour: "loss", playing: null, first: 0 };
  const number = (value) => value.toLocaleString("en");

  function* rows() {
    yield ["token", "text", "part", "loss in nats", "probability", ...range(layers).map((l) => `experts of layer ${l}`)];
    for (let t = 0; t < T; t++) {
      const cells = range(layers).map((l) => pairs(l, t).map(([e, value]) => `${e}:${value.toPrecision(3)}`).join(" "));
      yield [t, tokens[t], t < prompt ? "prompt" : "written", loss[t], Math.exp(-loss[t]), ...cells];
    }
  }

  // [expert, gate] of a token in a layer, by expert
  function pairs(layer, token) {
    if (token >= read) return [];
    const at = layer * read + token;
    return range(start[at + 1] - start[at]).map((i) => [expert[start[at] + i], gate[start[at] + i]]);
  }

  const sampling = Object.entries(found.sampling).map(([name, value]) => `${name} ${value}`).join(", ");
  const figure = remoe.figure("generation", "generation-steps", "The text as it was written",
    `${number(prompt)} tokens of the prompt, and ${number(T - prompt)} that the model wrote after it (${sampling}). Play shows them one after ` +
    "the other. The map shows which experts ran for each token while the model wrote: one layer, coloured by the gate, or all layers, " +
    "coloured by the number of experts. The last token has none, because the model did not read it any more.",
    rows);

  // The controls
  const play = element("button", "Play", { type: "button", id: "generation-play" });
  const slider = element("input", undefined, { type: "range", min: Math.min(prompt, T), max: T, step: 1, value: T, "aria-label": "Tokens written" });
  const place = element("span", "", { id: "generation-place" });
  const speed = choice("Speed", [[2, "2 tokens/s"], [10, "10 tokens/s"], [50, "50 tokens/s"]], () => state.playing && run());
  speed.select.value = 10;
  const layer = choice("Layer", [[ALL, "all layers"], ...remoe.layerNames], (value) => {
    state.layer = +value;
    showMap();
  });
  const colour = choice("Colour", [["loss", "loss"], ["count", "number of experts"]], (value) => {
    state.colour = value;
    showText(true);
  });
  const player = element("div", undefined, {
    class: "player", role: "group", tabindex: 0,
    "aria-label": "Generation; the space key plays and pauses, left and right arrow keys move by a token",
  });
  const bar = element("div", undefined, { class: "tools" });
  bar.append(play, slider, place, speed.label);
  const text = element("div", undefined, { id: "written", dir: "auto", role: "group", tabindex: 0, "aria-label": "Prompt and text" });
  const panel = element("div", undefined, { class: "panel", id: "generation-token" });
  const scale = element("p", undefined, { class: "scale" });
  figure.tools.prepend(layer.label, colour.label);
  player.append(bar, scale, text, panel);
  figure.body.append(player);

  // The text: `strength` colours it, and only its last tokens are in the page
  const highest = { loss: 0, count: 0 };
  const total = new Uint32Array(T);
  for (let t = 0; t < read; t++) for (let l = 0; l < layers; l++) total[t] += counts[l * read + t];
  for (let t = 0; t < T; t++) {
    if (loss[t] > highest.loss) highest.loss = loss[t];
    if (total[t] > highest.count) highest.count = total[t];
  }
  const measure = { loss: (t) => loss[t], count: (t) => total[t] };
  let from = 0, to = 0;

  function tokenSpan(t) {
    const span = element("span", tokens[t]);
    const value = measure[state.colour](t) / highest[state.colour];
    span.style.setProperty("--strength", Number.isFinite(value) ? value.toFixed(3) : 0);
    if (t === prompt) span.className = "begins";
    return span;
  }

  function showText(anew) {
    const first = Math.max(0, state.step - SHOWN);
    if (anew) {
      const most = `${short(highest[state.colour])} ${state.colour === "loss" ? "nats" : "experts, over all layers"}`;
      scale.replaceChildren(element("span", "0"), element("span", undefined, { class: "strip tint", "aria-hidden": "true" }), element("span", most));
    }
    if (anew || state.step < to || first > to) {
      text.replaceChildren(...range(state.step - first).map((i) => tokenSpan(first + i)));
    } else {
      for (let t = to; t < state.step; t++) text.append(tokenSpan(t));
      for (let t = from; t < first; t++) text.firstChild.remove();
    }
    [from, to] = [first, state.step];
    const before = text.querySelector(".here");
    if (before) before.classList.remove("here");
    if (text.lastChild) text.lastChild.classList.add("here");
    text.scrollTop = text.scrollHeight;
  }

  function showToken() {
    const t = state.step - 1;
    const title = element("p");
    const likely = Number.isNaN(loss[t]) ? "" : `, probability ${percent(Math.exp(-loss[t]))}, loss ${short(loss[t])} nats`;
    title.append(
      element("code", visible(tokens[t]) || "part of a character", { class: "token", dir: "auto" }),
      ` token ${number(t + 1)} of ${number(T)}, ${t < prompt ? "of the prompt" : "written"}${likely}`,
    );
    const list = element("ul");
    for (const l of range(layers)) {
      const row = element("li", undefined, { class: "row" });
      const taken = pairs(l, t).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
      const cells = element("span", taken.length ? undefined : "none");
      taken.forEach(([e, value], i) => {
        cells.append(i ? ", " : "", element("a", `${e}`, { href: `#expert-${l}-${e}` }), ` (${short(value)})`);
      });
      row.append(element("span", `layer ${l}`), cells);
      list.append(row);
    }
    panel.replaceChildren(title, t < read ? list : element("p", "Not read by the model, so that no expert ran."));
  }

  // The map: a window of columns, of which those up to the present token are filled
  const firstColumn = () => (state.step <= COLUMNS ? 0 : Math.ceil((state.step - COLUMNS) / HALF) * HALF);
  let dense = null; // (columns, rows) of the window

  function values() {
    const height = state.layer === ALL ? layers : experts;
    const end = Math.min(read, state.first + COLUMNS);
    dense = new Float32Array(COLUMNS * height);
    let most = 0;
    for (let t = state.first; t < end; t++) {
      const column = (t - state.first) * height;
      if (state.layer === ALL) for (let l = 0; l < layers; l++) dense[column + l] = counts[l * read + t];
      else {
        const at = state.layer * read + t;
        for (let i = start[at]; i < start[at + 1]; i++) dense[column + expert[i]] = Math.abs(gate[i]);
      }
    }
    if (state.layer === ALL) for (const count of counts) most = Math.max(most, count);
    else for (let i = start[state.layer * read]; i < start[(state.layer + 1) * read]; i++) most = Math.max(most, Math.abs(gate[i]));
    return {
      rows: height, columns: Math.min(COLUMNS, T - state.first), max: most || 1,
      value: (row, column) => dense[column * height + row],
    };
  }

  function describe(row, column) {
    const t = state.first + column;
    if (t >= state.step) return `Token ${number(t + 1)}: not written yet`;
    const name = `Token ${number(t + 1)} ${visible(tokens[t])}`;
    if (t >= read) return `${name}: not read by the model`;
    if (state.layer === ALL) return `${name}, layer ${row}: ${counts[row * read + t]} experts`;
    const taken = pairs(state.layer, t).find(([e]) => e === row);
    return `${name}, layer ${state.layer}, expert ${row}: ${taken ? `gate ${short(taken[1])}` : "not executed"}`;
  }

  const map = remoe.heatmap(figure, {
    ...values(), rowTick: (row) => (state.layer === ALL ? `layer ${row}` : String(row)), columnTick: (column) => number(state.first + column + 1),
    columnLabel: "token", describe, until: () => state.step - state.first,
  });

  function showMap() {
    state.first = firstColumn();
    map.set(values());
  }

  function go(step) {
    state.step = Math.max(+slider.min, Math.min(T, step));
    slider.value = state.step;
    place.textContent = `${number(Math.max(0, state.step - prompt))} of ${number(T - prompt)}`;
    slider.setAttribute("aria-valuetext", `${place.textContent} tokens written`);
    showText(false);
    showToken();
    if (firstColumn() !== state.first) showMap();
    else map.draw();
  }

  function pause() {
    clearTimeout(state.playing);
    state.playing = null;
    play.textContent = "Play";
    panel.setAttribute("aria-live", "polite");
  }

  // By the clock, so that a slow page shows fewer steps and not a slower text
  function run() {
    const rate = +speed.select.value, began = performance.now(), at = state.step;
    const next = () => {
      go(at + Math.floor(((performance.now() - began) / 1000) * rate));
      if (state.step < T) state.playing = setTimeout(next, 1000 / rate);
      else pause();
    };
    clearTimeout(state.playing);
    play.textContent = "Pause";
    panel.setAttribute("aria-live", "off");
    state.playing = setTimeout(next, 1000 / rate);
  }

  function toggle() {
    if (state.playing) return pause();
    if (state.step === T) go(+slider.min);
    run();
  }

  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => {
    pause();
    go(+slider.value);
  });
  player.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "BUTTON", "A"].includes(event.target.tagName)) return;
    const far = event.shiftKey ? 10 : 1;
    const step = { ArrowLeft: state.step - far, ArrowRight: state.step + far, Home: +slider.min, End: T }[event.key];
    if (event.key === " ") toggle();
    else if (step !== undefined) {
      pause();
      go(step);
    } else return;
    event.preventDefault();
  });

  pause();
  showText(true);
  go(T);

  const curve = remoe.figure("generation", "generation-loss", "Loss of each token",
    "Cross-entropy of each token after those before it, in nats, under the model's own distribution. A token of loss 0.7 had a probability " +
    "of one half; a high value is a token that the model did not expect.",
    () => [["token", "loss in nats"], ...range(T).map((t) => [t + 1, loss[t]])]);
  remoe.lines(curve, {
    x: range(T).map((t) => t + 1), xName: "token", names: ["of the prompt", "written"], unit: "nats per token",
    values: [loss.map((value, t) => (t < prompt ? value : NaN)), loss.map((value, t) => (t < prompt ? NaN : value))],
  });
})();
