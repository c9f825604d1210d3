"use strict";
// The text: coloured tokens, and the experts of one token.
(() => {
  if (!remoe.data.text || !remoe.data.text.texts.length) return;
  const { data, unpack, element, range, short, visible, choice } = remoe;
  const { texts, gatesKnown } = data.text;
  const { layers, experts } = data.head;
  const $ = (id) => document.getElementById(id);
  const state = { text: 0, mode: "count", layer: -1, expert: 0, token: 0 };
  const opened = new Map();
  let strengths = [], scroller = null;

  // Unpacks a text when it is first shown
  function open(number) {
    if (opened.has(number)) return opened.get(number);
    const packed = texts[number];
    const T = packed.tokens.length;
    const counts = unpack(packed.counts), expert = unpack(packed.expert);
    const start = new Uint32Array(layers * T + 1);
    for (let i = 0; i < counts.length; i++) start[i + 1] = start[i] + counts[i];
    const found = {
      T, counts, expert, start, tokens: packed.tokens, gate: packed.gate && unpack(packed.gate),
      loss: unpack(packed.loss), seen: unpack(packed.seen), joined: packed.tokens.join("").toLowerCase(), ends: [],
    };
    let end = 0;
    found.ends = packed.tokens.map((token) => (end += token.toLowerCase().length));
    opened.set(number, found);
    return found;
  }

  const current = () => open(state.text);

  // [expert, gate] of a token in a layer, by decreasing gate
  function pairs(text, layer, token) {
    const at = layer * text.T + token;
    const found = [];
    for (let i = text.start[at]; i < text.start[at + 1]; i++) found.push([text.expert[i], text.gate ? text.gate[i] : null]);
    return found.sort((a, b) => (Math.abs(b[1]) || 0) - (Math.abs(a[1]) || 0));
  }

  // What colours each token: NaN for none
  const measures = {
    count(text) {
      const shown = state.layer < 0 ? range(layers) : [state.layer];
      const values = new Float32Array(text.T);
      for (const layer of shown) for (let t = 0; t < text.T; t++) values[t] += text.counts[layer * text.T + t];
      return values;
    },
    expert(text) {
      const values = new Float32Array(text.T).fill(NaN);
      const layer = Math.max(0, state.layer);
      for (let t = 0; t < text.T; t++) {
        const at = layer * text.T + t;
        for (let i = text.start[at]; i < text.start[at + 1]; i++) {
          if (text.expert[i] === state.expert) values[t] = text.gate ? Math.abs(text.gate[i]) : 1;
        }
      }
      return values;
    },
    loss: (text) => text.loss,
    seen: (text) => Float32Array.from(text.seen, (count) => (count ? Math.log10(count) : NaN)),
  };

  function describe(values) {
    let taken = 0, sum = 0;
    for (const value of values) {
      if (Number.isNaN(value)) continue;
      taken += 1;
      sum += value;
    }
    const mean = short(taken ? sum / taken : NaN);
    const where = state.layer < 0 ? "summed over all layers" : `in layer ${state.layer}`;
    return {
      count: `Number of experts of each token, ${where}: ${mean} on average.`,
      expert: `Gate of expert ${state.expert} in layer ${Math.max(0, state.layer)}, which takes ${taken.toLocaleString("en")} ` +
        `of these ${values.length.toLocaleString("en")} tokens.`,
      loss: `Loss of the model's prediction of the token that follows, in nats: ${mean} on average.`,
      seen: "How often the token occurs in the recorded text; the colour follows the logarithm.",
    }[state.mode];
  }

  function legend(values) {
    let highest = -Infinity, lowest = Infinity;
    for (const value of values) {
      if (value > highest) highest = value;
      if (value < lowest) lowest = value;
    }
    const low = state.mode === "seen" ? lowest : 0;
    const floor = state.mode === "seen" && highest > lowest ? lowest - 0.1 * (highest - lowest) : 0;
    const span = highest - floor;
    strengths = Float32Array.from(values, (value) => (Number.isNaN(value) || !(span > 0) ? 0 : Math.max(0, (value - floor) / span)));
    const shown = (value) => (!Number.isFinite(value) ? "none" : state.mode === "seen" ? short(Math.round(10 ** value)) : short(value));
    const bar = element("span", undefined, { class: "strip tint", "aria-hidden": "true" });
    $("legend").replaceChildren(element("span", shown(low)), bar, element("span", shown(highest)));
    $("scale").textContent = describe(values);
  }

  function mark(span, token) {
    span.style.setProperty("--strength", strengths[token].toFixed(3));
    span.className = (token === state.token ? "here " : "") + (search.marks(token) ? "hit" : "");
  }


  function recolour() {
    legend(measures[state.mode](current()));
    scroller.remark();
  }

  function showToken(token, scroll) {
    const text = current();
    const last = state.token;
    state.token = token;
    scroller.remark(last);
    if (scroll) scroller.reveal(token);
    scroller.remark(token);
    const title = element("p");
    title.append(
      element("code", visible(text.tokens[token]) || "part of a character", { class: "token", dir: "auto" }),
      ` token ${(token + 1).toLocaleString("en")} of ${text.T.toLocaleString("en")}` +
      (text.seen[token] ? `, occurs ${text.seen[token] === 1 ? "once" : `${text.seen[token].toLocaleString("en")} times`}` : "") +
      (Number.isNaN(text.loss[token]) ? "" : `, loss of the next ${short(text.loss[token])} nats`),
    );
    const list = element("ul");
    for (let layer = 0; layer < layers; layer++) {
      const row = element("li", undefined, { class: "row" });
      const experts = element("span");
      const taken = pairs(text, layer, token);
      taken.forEach(([expert, gate], i) => {
        if (i) experts.append(", ");
        experts.append(element("a", `${expert}`, { href: `#expert-${layer}-${expert}` }));
        if (gatesKnown) experts.append(` (${Number.isFinite(gate) ? short(gate) : "not a number"})`);
      });
      if (!taken.length) experts.textContent = "none";
      row.append(element("span", `layer ${layer}`), experts);
      list.append(row);
    }
    $("token").replaceChildren(title, list);
  }

  const search = remoe.search({ text: current, show: (token) => showToken(token, true), remark: () => scroller.remark() });

  // The token shown before the reader points at one: the first would often be an empty line.
  function busiest() {
    const text = current();
    let best = 0, most = -1;
    for (let t = 0; t < Math.min(text.T, 200); t++) {
      let count = 0;
      for (let layer = 0; layer < layers; layer++) count += text.counts[layer * text.T + t];
      if (count > most) [best, most] = [t, count];
    }
    return best;
  }

  function show() {
    search.clear();
    legend(measures[state.mode](current()));
    scroller.lay(current().tokens);
    $("cut").hidden = !texts[state.text].cut;
    showToken(busiest(), false);
  }

  function* rows() {
    const text = current();
    const names = ["domain", "token", "text", "occurrences", "loss of the next token in nats", ...range(layers).map((layer) => `experts of layer ${layer}`)];
    const { domain } = texts[state.text];
    yield names;
    for (let t = 0; t < text.T; t++) {
      const row = [domain, t, text.tokens[t], text.seen[t], text.loss[t]];
      for (let layer = 0; layer < layers; layer++) {
        const at = layer * text.T + t;
        let cell = "";
        for (let i = text.start[at]; i < text.start[at + 1]; i++) {
          cell += `${cell && " "}${text.expert[i]}${text.gate ? `:${text.gate[i].toPrecision(3)}` : ""}`;
        }
        row.push(cell);
      }
      yield row;
    }
  }

  const figure = remoe.figure("text", "text-tokens", "Experts of each token", $("text-words").content.textContent.trim().replace(/\s+/g, " "), rows);
  figure.body.append($("text-body").content);
  const options = (names) => names.map((name, i) => [i, name]);
  const domain = choice("Text", options(texts.map((text) => text.domain)), (value) => {
    state.text = +value;
    show();
  });
  const modes = [["count", "number of experts"], ["expert", "gate of one expert"], ["loss", "loss"], ["seen", "frequency"]];
  const known = modes.filter(([mode]) => mode !== "loss" || texts.some((text) => unpack(text.loss).some((value) => !Number.isNaN(value))));
  const mode = choice("Colour", known, (value) => setColour(value, state.layer, state.expert));
  const layer = choice("Layer", [[-1, "all layers"], ...remoe.layerNames], (value) => setColour(state.mode, +value, state.expert));
  const expert = choice("Expert", options(range(experts)), (value) => setColour(state.mode, state.layer, +value));

  function setColour(how, ofLayer, ofExpert) {
    Object.assign(state, { mode: how, layer: how === "expert" ? Math.max(0, ofLayer) : ofLayer, expert: ofExpert });
    mode.select.value = how;
    layer.select.value = state.layer;
    expert.select.value = ofExpert;
    layer.label.hidden = how === "loss" || how === "seen";
    expert.label.hidden = how !== "expert";
    recolour();
  }
  figure.tools.prepend(domain.label, mode.label, layer.label, expert.label, ...search.controls);

  scroller = remoe.scroller($("excerpt"), { mark, point: (token) => showToken(token, false) });
  remoe.tokenKeys($("excerpt"), () => current().T, () => state.token, (token) => showToken(token, true));
  show();
  setColour("count", -1, 0);
  remoe.colourBy = (ofLayer, ofExpert) => {
    setColour("expert", ofLayer, ofExpert);
    figure.figure.scrollIntoView();
    $("excerpt").focus({ preventScroll: true });
  };
})();
