"use strict";
// Curves of several models in one plot: by layer, and over training.
(() => {
  const { data, element, range, unpack, choice, routed, joined, columns } = remoe;
  const pairs = (id) => {
    const place = element("div", undefined, { class: "pairs", id: `${id}-plots` });
    document.getElementById(id).append(place);
    return place.id;
  };

  if (data.layers) {
    const place = pairs("layers");
    const words = {
      active: ["Active experts by layer", "Mean number of experts of a token in each layer (Fig. 8 of the paper). With TopK it is the same in all layers; ReMoE spreads the compute itself.", "experts per token"],
      imbalance: ["Load balance by layer", "Load of the busiest expert divided by the mean load. 1 is even; a high value is a layer that uses few of its experts.", "busiest / mean"],
      specialisation: ["Specialisation by layer", "How much a token's expert reveals about its domain, from 0 (nothing) to 1 (everything).", "share of the domain's entropy"],
      reuse: ["Reuse by layer", "Share of a token's experts that the next token also uses. High values save loading of weights when text is generated.", "share reused"],
      fromOne: ["Predictability by layer", "Share of a token's experts that are guessed right from its experts in the layer before.", "share guessed right"],
    };
    for (const [name, [title, text, unit]] of Object.entries(words)) {
      const series = data.layers.map((one, i) => ({ number: routed[i].number, x: range(one[name].length), values: one[name] }));
      if (!series.some((one) => one.values.some((value) => value !== null))) continue;
      const plot = joined(series);
      const figure = remoe.figure(place, `layer-${name}`, title, text, () => columns("layer", plot));
      remoe.lines(figure, { ...plot, xName: "layer", unit });
    }
  }

  const training = data.training;
  if (!training) return;
  const LOG = ["lambda", "penalty", "grad_norm"];
  const words = {
    lm_loss: ["Training loss", "Loss of the language model at each step, without what is added to it (Fig. 4 of the paper). Lower is better.", "nats per token"],
    sparsity: ["Sparsity S", "Share of (token, expert) pairs that are inactive (Fig. 3 of the paper). ReLU routing starts dense and becomes sparse; TopK has the same sparsity at every step.", "share of inactive pairs"],
    lambda: ["Coefficient λ", "Weight of the router's term in the loss (Fig. 4 of the paper). It moves where it controls the sparsity, and is constant for other routers.", "λ (log scale)"],
    reg_loss: ["Regulariser", "The router's term before λ multiplies it (Fig. 4 of the paper); with ReLU routing the sum of gates. The term differs between routers.", "regulariser"],
    penalty: ["Penalty", "λ times the router's term: what training adds to the loss (Fig. 4 of the paper).", "nats (log scale)"],
    imbalance: ["Load imbalance", "Load of the busiest expert divided by the mean load, of all layers; 1 is even.", "busiest / mean"],
    dead: ["Dead experts", "Share of the experts that take less than an eighth of the target load at a step.", "share of experts"],
    flip_rate: ["Flips", "Share of (token, expert) pairs of a fixed text that change in one training step (Fig. 10 of the paper): the lower, the more stable the routing.", "share of pairs"],
    tokens_per_second: ["Throughput", "Tokens per second of each step. Compare only runs that were trained alone on the same machine.", "tokens/s"],
    grad_norm: ["Gradient norm", "Norm of the gradient before it is clipped; peaks are unstable steps.", "norm (log scale)"],
  };
  const place = pairs("training");
  const made = [];
  const same = new Set(training.filter(Boolean).map((one) => one.tokensPerStep)).size === 1;
  let unit = "step", log = false;
  const bar = element("div", undefined, { class: "tools" });
  const label = element("label"), box = element("input", undefined, { type: "checkbox", id: "log-steps" });
  label.append(box, " logarithmic scale, which shows the first stages");
  const over = choice("Over", [["step", "steps"], ["tokens", "tokens trained on"]], (value) => {
    unit = value;
    draw();
  });
  over.label.hidden = same;
  bar.append(label, over.label);
  document.getElementById(place).before(bar);
  box.addEventListener("change", () => {
    log = box.checked;
    draw();
  });

  function plotOf(name, over) {
    return joined(training.flatMap((one, number) => {
      if (!one || !one.plots[name]) return [];
      const plot = one.plots[name], scale = over === "tokens" ? one.tokensPerStep : 1;
      return [{ number, x: Array.from(unpack(plot.step), (step) => step * scale), values: unpack(plot.values) }];
    }));
  }
  function draw() {
    for (const [name, lines] of made) lines.set({ ...plotOf(name, unit), xName: unit, logX: log });
  }
  const targets = [...new Set(training.filter((one) => one && one.target !== null).map((one) => one.target))];
  for (const [name, [title, text, ofY]] of Object.entries(words)) {
    if (!training.some((one) => one && one.plots[name])) continue;
    const aim = name === "sparsity" && targets.length === 1 ? " The grey dashed line is the target." : "";
    const figure = remoe.figure(place, `training-${name}`, title, text + aim, () => columns("step", plotOf(name, "step")));
    made.push([name, remoe.lines(figure, {
      ...plotOf(name, unit), xName: unit, unit: ofY, log: LOG.includes(name), sync: "training", target: aim ? targets[0] : null,
    })]);
  }
})();
