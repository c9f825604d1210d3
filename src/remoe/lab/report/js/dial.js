"use strict";
// The dial: loss and speed against the gate threshold and the cap on a token's experts, as measured.
(() => {
  const found = remoe.data.dial;
  if (!found) return;
  const { range } = remoe;
  const tokens = `${found.tokens.toLocaleString("en")} tokens`;
  const names = ["loss in nats", "active experts per token and layer", "tokens/s"];
  const kinds = {
    threshold: {
      name: "gate threshold", trained: 0,
      words: "Experts whose gate is at most the threshold are left out. The dot at 0 and the dashed line are the model as it was trained.",
    },
    cap: {
      name: "most experts of a token", trained: found.cap.setting.length - 1,
      words: "A token keeps at most so many experts, those with the largest gates. The dot at the right and the dashed line are the model as it " +
        "was trained: no token has more experts.",
    },
  };
  const plots = [
    ["loss", "Loss", "nats per token", (text) => `Loss on ${tokens}. ${text} Lower is better.`],
    ["speed", "Speed", "tokens/s", (text) => `Tokens per second of a forward pass over the same text, on ${found.machine}. ${text} Higher is better.`],
  ];
  for (const [kind, { name, trained, words }] of Object.entries(kinds)) {
    const { setting, loss, active, speed } = found[kind];
    const rows = () => [[name, ...names], ...range(setting.length).map((i) => [setting[i], loss[i], active[i], speed[i]])];
    for (const [measure, title, unit, describe] of plots) {
      const values = found[kind][measure];
      const figure = remoe.figure("dial", `dial-${kind}-${measure}`, `${title} against the ${name}`, describe(words), rows);
      remoe.lines(figure, {
        x: setting, xName: name, names: ["measured", "as trained"], unit, target: values[trained], fraction: kind === "threshold",
        values: [values, values.map((value, i) => (i === trained ? value : NaN))], dots: [false, true],
      });
    }
  }
})();
