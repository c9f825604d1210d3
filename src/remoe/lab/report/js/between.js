"use strict";
// Between layers: measures of each layer, how well routing is predicted from the layers before, and the flow of tokens.
(() => {
  if (!remoe.data.between) return;
  const { data, unpack, range, percent, element, choice } = remoe;
  const found = data.between;
  const { layers, experts } = data.head;
  const x = range(layers);
  const curves = (id, title, words, unit, names, values) => {
    const figure = remoe.figure("between", id, title, words, () => [["layer", ...names], ...x.map((l) => [l, ...values.map((one) => one[l])])]);
    remoe.lines(figure, { x, xName: "layer", names, values, unit });
  };
  const guess = (i) => found.guesses.map((one) => one[i]);
  if (layers > 1) {
    curves("predictability", "Predictability of routing",
      "Share of a token's experts that are guessed right: from the load of the experts alone, from the token's experts in the layer before, " +
      "and from those in the two layers before. Which expert follows which is counted on half of the sequences; the guesses are for the other " +
      "half. A curve far above that of the load means that the layers decide together.",
      "share guessed right", ["from load alone", "from layer − 1", "from layers − 1 and − 2"], [guess(0), guess(1), guess(2)]);
    curves("reuse", "Neighbouring tokens",
      `Reuse: share of a token's experts that the next token also uses. Chunk sparsity: share of experts that none of ${found.chunk} ` +
      "consecutive tokens uses; their weights need not be loaded when so many tokens are processed together.",
      "share", ["reuse", `sparsity of ${found.chunk} tokens`, "sparsity"], [found.reuse, found.chunkSparsity, found.sparsity]);
  }
  const names = ["sparsity", "busiest / mean", "specialisation", `sparsity of ${found.chunk} tokens`, "reuse", "guessed by load", "from layer − 1", "from layers − 1, − 2"];
  const values = [found.sparsity, found.imbalance, found.specialisation, found.chunkSparsity, found.reuse, guess(0), guess(1), guess(2)];
  const table = remoe.figure("between", "measures", "Measures of each layer",
    "Sparsity: share of (token, expert) pairs that are inactive. Busiest / mean: load of the busiest expert divided by the mean load. " +
    "Specialisation: how much an expert reveals about the domain of a token, from 0 (nothing) to 1 (everything). The other columns are the curves above.",
    () => [["layer", ...names], ...x.map((l) => [l, ...values.map((one) => one[l])])]);
  const made = element("table", undefined, { class: "numbers" });
  const row = (cells, kind) => {
    const line = element("tr");
    cells.forEach((cell, i) => line.append(element(kind === "th" || !i ? "th" : "td", cell, kind === "th" ? { scope: "col" } : i ? {} : { scope: "row" })));
    return line;
  };
  const head = element("thead"), body = element("tbody");
  head.append(row(["layer", ...names], "th"));
  for (const l of x) body.append(row([`${l}`, ...values.map((one) => (one[l] === null ? "–" : one[l].toFixed(3)))]));
  made.append(head, body);
  const scroll = element("div", undefined, { class: "scroll", tabindex: 0, role: "group", "aria-label": "Measures of each layer" });
  scroll.append(made);
  table.body.append(scroll);

  if (!found.flow) return;
  const flow = unpack(found.flow);
  const at = (l, from, to) => flow[(l * experts + from) * experts + to];
  let layer = 1;
  const highest = () => {
    let most = 0;
    for (let i = (layer - 1) * experts ** 2; i < layer * experts ** 2; i++) if (flow[i] > most) most = flow[i];
    return most || 1;
  };
  function* rows() {
    yield ["from layer", "expert", "to layer", "expert", "share of the tokens"];
    for (let l = 0; l < layers - 1; l++) {
      for (let from = 0; from < experts; from++) {
        for (let to = 0; to < experts; to++) yield [l, from, l + 1, to, at(l, from, to)];
      }
    }
  }
  const figure = remoe.figure("between", "flow", "Flow from layer to layer",
    "Share of the tokens of an expert (row) that an expert of the next layer (column) also takes. A strongly coloured cell is a path that many " +
    "tokens follow; a strongly coloured column is an expert that takes many tokens of any origin.",
    rows);
  const map = remoe.heatmap(figure, {
    rows: experts, columns: experts, value: (from, to) => at(layer - 1, from, to), max: highest(), rowTick: String, columnTick: String,
    columnLabel: "expert of the next layer", format: percent, unit: "of the row's tokens",
    describe: (from, to) => {
      const share = at(layer - 1, from, to);
      return Number.isNaN(share) ? `Layer ${layer - 1}, expert ${from} has no tokens`
        : `Of the tokens of expert ${from} in layer ${layer - 1}, ${percent(share)} go to expert ${to} in layer ${layer}`;
    },
  });
  const pick = choice("Layers", range(layers - 1).map((l) => [l + 1, `${l} to ${l + 1}`]), (value) => {
    layer = +value;
    map.set({ max: highest() });
  });
  figure.tools.prepend(pick.label);
})();
