"use strict";
// The text in several models: coloured by the difference of one to the reference, and both for one token.
(() => {
  const found = remoe.data.text;
  if (!found || !found.length) return;
  const { unpack, element, range, short, visible, choice, routed, named } = remoe;
  const shared = Math.min(...routed.map((model) => model.layers)); // layers that all models have
  const $ = (id) => document.getElementById(id);
  const state = { text: 0, mode: "count", layer: -1, other: 1, span: 0 };
  const MOST = 0.98; // the share of the differences that the scale does not cut
  const opened = new Map();
  let strengths = [];

  // Unpacks a text when it is first shown
  function open(number) {
    if (opened.has(number)) return opened.get(number);
    const packed = found[number];
    const models = packed.models.map((one, i) => {
      const counts = unpack(one.counts), [layers, T] = one.counts.shape;
      const start = new Uint32Array(layers * T + 1);
      for (let j = 0; j < counts.length; j++) start[j + 1] = start[j] + counts[j];
      return {
        T, layers, counts, start, expert: unpack(one.expert), gate: one.gate && unpack(one.gate), loss: unpack(one.loss),
        tokens: one.tokens || packed.tokens, ends: packed.ends && unpack(packed.ends[i]),
      };
    });
    const made = { models, spans: packed.spans };
    made.pieces = range(packed.spans).map((span) => text(made, packed.namedBy, span));
    let end = 0;
    made.joined = made.pieces.join("").toLowerCase();
    made.placed = made.pieces.map((piece) => (end += piece.toLowerCase().length));
    opened.set(number, made);
    return made;
  }

  // The tokens of a model in a span: first, and one behind the last
  const tokensOf = (model, span) => (model.ends ? [span ? model.ends[span - 1] : 0, model.ends[span]] : [span, span + 1]);
  const text = (of, i, span) => of.models[i].tokens.slice(...tokensOf(of.models[i], span)).join("");
  const current = () => open(state.text);

  // What is compared, of one span: the mean number of experts of a token in a layer, or the sum of the losses
  const measures = {
    count(model, span, layer) {
      const [first, end] = tokensOf(model, span);
      let sum = 0;
      for (let l = layer < 0 ? 0 : layer; l < (layer < 0 ? model.layers : layer + 1); l++) {
        for (let t = first; t < end; t++) sum += model.counts[l * model.T + t];
      }
      return sum / ((end - first) * (layer < 0 ? model.layers : 1));
    },
    loss(model, span) {
      const [first, end] = tokensOf(model, span);
      let sum = 0;
      for (let t = first; t < end; t++) sum += t ? model.loss[t - 1] : NaN; // a record has the loss of the next token
      return sum;
    },
  };

  const signed = (value) => (Number.isNaN(value) ? "–" : `${value > 0 ? "+" : value < 0 ? "−" : "±"}${short(Math.abs(value))}`);

  function recolour() {
    const { models, spans } = current();
    const value = (i, span) => measures[state.mode](models[i], span, state.layer);
    const differences = Float32Array.from({ length: spans }, (_, span) => value(state.other, span) - value(0, span));
    const sizes = Array.from(differences, Math.abs).filter((size) => size > 0).sort((a, b) => a - b);
    const highest = sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(MOST * sizes.length))] : 0;
    strengths = differences.map((value) => (highest && !Number.isNaN(value) ? Math.max(-1, Math.min(1, value / highest)) : 0));
    const known = differences.filter((value) => !Number.isNaN(value));
    const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
    const [name, reference] = [routed[state.other].name, routed[0].name];
    const unit = state.mode === "count" ? "experts of a token in a layer" : "nats with which a model predicts it from the text before it";
    const where = state.mode === "loss" ? "" : state.layer < 0 ? ", mean of all layers" : `, layer ${state.layer}`;
    $("scale").textContent = `Colour: ${unit}${where}, ${name} minus ${reference}; ${signed(mean)} on average. ` +
      (state.mode === "count" ? `Orange: ${name} uses more experts; blue: fewer.` : `Orange: ${name} predicts it worse; blue: better.`);
    const bar = element("span", undefined, { class: "strip both", "aria-hidden": "true" });
    const ends = highest ? [`−${short(highest)} or less`, `+${short(highest)} or more`] : ["no difference", ""];
    $("legend").replaceChildren(element("span", ends[0]), bar, element("span", ends[1]));
    scroller.remark();
  }

  function mark(made, span) {
    made.style.setProperty("--strength", Math.abs(strengths[span]).toFixed(3));
    made.className = (strengths[span] > 0 ? "more " : "") + (span === state.span ? "here " : "") + (search.marks(span) ? "hit" : "");
  }
  let scroller = null;

  function cell(model, layer, span) {
    const [first, end] = tokensOf(model, span);
    const tokens = range(end - first).map((i) => {
      const at = layer * model.T + first + i;
      const pairs = range(model.start[at + 1] - model.start[at]).map((j) => model.start[at] + j);
      if (model.gate) pairs.sort((a, b) => Math.abs(model.gate[b]) - Math.abs(model.gate[a]));
      return pairs.map((j) => `${model.expert[j]}${model.gate ? ` (${short(model.gate[j])})` : ""}`).join(", ") || "none";
    });
    return tokens.join(" | ");
  }

  function row(title, texts) {
    const line = element("tr");
    line.append(element("th", title, { scope: "row" }), ...texts.map((text) => element("td", text)));
    return line;
  }

  function showSpan(span, scroll) {
    const of = current(), last = state.span;
    state.span = span;
    scroller.remark(last);
    if (scroll) scroller.reveal(span);
    scroller.remark(span);
    const title = element("p");
    title.append(element("code", visible(of.pieces[span]) || "part of a character", { class: "token", dir: "auto" }),
      ` ${of.models[0].ends ? "piece" : "token"} ${(span + 1).toLocaleString("en")} of ${of.spans.toLocaleString("en")}`);
    const table = element("table", undefined, { class: "numbers spans" });
    const head = element("thead"), top = element("tr"), body = element("tbody");
    top.append(element("td"), ...routed.map((model) => {
      const name = named("th", model.number);
      name.setAttribute("scope", "col");
      return name;
    }));
    head.append(top);
    const [counts, losses] = ["count", "loss"].map((mode) => of.models.map((model) => measures[mode](model, span, -1)));
    const texts = (all) => all.map((value, i) => (i ? `${short(value)} (${signed(value - all[0])})` : short(value)));
    body.append(row("experts per layer", texts(counts)), row("loss in nats", texts(losses)));
    if (of.models[0].ends) {
      body.append(row("tokens", of.models.map((model) => model.tokens.slice(...tokensOf(model, span)).map((one) => visible(one) || "·").join(" | "))));
    }
    for (let l = 0; l < Math.max(...of.models.map((model) => model.layers)); l++) {
      body.append(row(`layer ${l}`, of.models.map((model) => (l < model.layers ? cell(model, l, span) : "–"))));
    }
    table.append(head, body);
    const scrolled = element("div", undefined, { class: "scroll" });
    scrolled.append(table);
    $("token").replaceChildren(title, scrolled);
  }

  const search = remoe.search({
    text: () => ({ joined: current().joined, ends: current().placed }),
    show: (span) => showSpan(span, true), remark: () => scroller.remark(),
  });

  function show() {
    state.span = 0;
    search.clear();
    $("cut").hidden = !found[state.text].cut;
    strengths = new Float32Array(current().spans);
    scroller.lay(current().pieces);
    recolour();
    // The token shown before the reader points at one: the largest difference near the beginning
    const near = Array.from(strengths.slice(0, 200), Math.abs);
    showSpan(near.indexOf(Math.max(...near)), false);
  }

  function* rows() {
    const of = current();
    yield ["domain", "number", "text", ...routed.flatMap((model) => [`${model.name}: experts per layer`, `${model.name}: loss in nats`,
      ...range(model.layers).map((l) => `${model.name}: experts of layer ${l}`)])];
    for (let span = 0; span < of.spans; span++) {
      yield [found[state.text].domain, span, of.pieces[span], ...of.models.flatMap((model) => [
        measures.count(model, span, -1), measures.loss(model, span), ...range(model.layers).map((l) => cell(model, l, span)),
      ])];
    }
  }

  const words = "The same text in all models. A token is coloured by how much a model differs from the reference: in its number of experts, or in " +
    "how well it predicts the token. Point at a token or tap it, or move with the arrow keys, to see its experts, their gates and its loss in each model.";
  const figure = remoe.figure("text", "text-tokens", "Differences in the text", words, rows);
  figure.body.append($("text-body").content);
  const known = found.some((one) => one.models.every((model) => unpack(model.loss).some((value) => !Number.isNaN(value))));
  const options = (names) => names.map((name, i) => [i, name]);
  const domain = choice("Text", options(found.map((one) => one.domain)), (value) => {
    state.text = +value;
    show();
  });
  const mode = choice("Colour", [["count", "number of experts"], ...(known ? [["loss", "loss"]] : [])], (value) => {
    state.mode = value;
    layer.label.hidden = value === "loss";
    recolour();
  });
  const layer = choice("Layer", [[-1, "all layers"], ...range(shared).map((l) => [l, `layer ${l}`])], (value) => {
    state.layer = +value;
    recolour();
  });
  const other = choice("Model", routed.slice(1).map((model, i) => [i + 1, model.name]), (value) => {
    state.other = +value;
    recolour();
  });
  other.label.hidden = routed.length < 3;
  figure.tools.prepend(domain.label, mode.label, layer.label, other.label, ...search.controls);
  scroller = remoe.scroller($("excerpt"), { mark, point: (span) => showSpan(span, false) });
  remoe.tokenKeys($("excerpt"), () => current().spans, () => state.span, (span) => showSpan(span, true));
  show();
})();
