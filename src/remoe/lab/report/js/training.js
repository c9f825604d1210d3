"use strict";
// Training: curves over the steps, with the stages behind them, and the load of each expert.
(() => {
  const found = remoe.data.training;
  if (!found) return;
  const { rowsOf, unpack, range, percent, element, choice } = remoe;
  const LOG = ["lambda", "penalty", "grad_norm"];
  const steered = found.target !== null; // by a penalty on the gates
  const words = {
    lm_loss: ["Training loss", "Loss of the language model, without the penalty, at each step. Lower is better.", "nats per token"],
    sparsity: ["Sparsity S", `Share of (token, expert) pairs that are inactive.${steered ? " The dashed line is the target." : ""}`, "share of inactive pairs"],
    lambda: ["Coefficient λ", found.controlled
      ? "Weight of the penalty on the gates. It grows while too many experts are active and shrinks while too few are."
      : `Weight of the ${steered ? "penalty on the gates" : "router's own loss"} in the training loss. It is constant in this run.`, "λ (log scale)"],
    reg_loss: ["Regulariser", steered ? "The sum of gates that is penalised, before it is multiplied by λ."
      : "The router's own loss, before it is multiplied by λ; zero for a router without one.", steered ? "per token" : "regulariser"],
    penalty: ["Penalty", "λ times the regulariser: what training adds to the loss.", "nats (log scale)"],
    sparsity_per_layer: ["Sparsity of each layer", "Share of (token, expert) pairs of each layer that are inactive." +
      (steered ? " The target holds for the mean over the layers; single layers may be denser or sparser." : ""), "share of inactive pairs"],
    inactive: ["Inactive experts", "Number of experts, over all layers, with less than an eighth of the target load at a step. An expert that stays inactive is dead.", "experts"],
    flip_rate: ["Flips", "Share of (token, expert) pairs of a fixed text that change in one training step: how unstable the routing is.", "share of pairs"],
    tokens_per_second: ["Throughput", "Tokens per second of each step. Single low values are steps beside a validation or a checkpoint.", "tokens/s"],
    memory: ["Memory", "Memory that the first process held after each step: main memory on a CPU, and on a GPU the most GPU memory up to the step.", "GiB"],
    grad_norm: ["Gradient norm", "Norm of the gradient before it is clipped.", "norm (log scale)"],
    lr: ["Learning rate", "Learning rate of each step: it rises in the warm-up and then falls.", "learning rate"],
  };
  const made = [];
  const bar = element("div", undefined, { class: "tools" });
  const label = element("label");
  const box = element("input", undefined, { type: "checkbox", id: "log-steps" });
  label.append(box, " steps on a logarithmic scale, which shows the first stages");
  bar.append(label);
  document.getElementById("training").append(bar);
  box.addEventListener("change", () => made.forEach((one) => one.set({ logX: box.checked })));

  for (const [name, [title, text, unit]] of Object.entries(words)) {
    const plot = found.plots[name];
    if (!plot) continue;
    const steps = unpack(plot.step), values = rowsOf(plot.values);
    const names = plot.names.length > 1 ? plot.names : [title];
    const figure = remoe.figure("training", `training-${name}`, title, text,
      () => [["step", ...names], ...range(steps.length).map((i) => [steps[i], ...values.map((one) => one[i])])]);
    made.push(remoe.lines(figure, {
      x: steps, xName: "step", names, values, unit, log: LOG.includes(name), stages: found.stages, sync: "training",
      target: name.startsWith("sparsity") ? found.target : null,
    }));
  }
  if (!found.load) return;
  const steps = unpack(found.load.step), share = unpack(found.load.share);
  const [layers, experts, columns] = found.load.share.shape;
  const at = (l, e, i) => share[(l * experts + e) * columns + i];
  let layer = 0;
  function* rows() {
    yield ["layer", "expert", "from step", "share of the tokens"];
    for (let l = 0; l < layers; l++) {
      for (let e = 0; e < experts; e++) {
        for (let i = 0; i < columns; i++) yield [l, e, steps[i], at(l, e, i)];
      }
    }
  }
  const figure = remoe.figure("training", "training-load", "Load of each expert during training",
    "Share of the tokens that each expert of a layer takes, from the first step to the last; a column shows the mean of its steps. " +
    "A row that loses its colour is an expert that takes almost no tokens. The scale ends at four times the target load.",
    rows);
  const max = Math.min(1, 4 * (remoe.data.head.k || 1) / experts);
  const map = remoe.heatmap(figure, {
    rows: experts, columns, value: (e, i) => at(layer, e, i), max, rowTick: String, columnTick: (i) => steps[i].toLocaleString("en"),
    columnLabel: "step", format: percent, unit: "of the tokens or more",
    describe: (e, i) => `Layer ${layer}, expert ${e}, from step ${steps[i].toLocaleString("en")}: ${percent(at(layer, e, i))} of the tokens`,
  });
  const pick = choice("Layer", range(layers).map((l) => [l, `layer ${l}`]), (value) => {
    layer = +value;
    map.set({});
  });
  figure.tools.prepend(pick.label);
})();
