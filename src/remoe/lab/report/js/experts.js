"use strict";
// The experts: their load, a card for each, their domains, and rare and frequent tokens.
(() => {
  if (!remoe.data.experts) return;
  const { data, unpack, element, range, percent, short, visible, choice } = remoe;
  const found = data.experts;
  const { layers, experts, k } = data.head;
  const load = data.training && data.training.load;
  const loadShare = load && unpack(load.share), loadSteps = load && unpack(load.step);
  const target = k / experts;
  const names = ["layer", "expert"];
  const cells = (header, value) => [header, ...range(layers).flatMap((l) => range(experts).map((e) => [l, e, ...value(l, e)]))];
  const nats = (value) => `${value < 0 ? "−" : "+"}${short(Math.abs(value))}`;
  const onTokens = found.effect && `${found.effect.tokens.toLocaleString("en")} tokens`;
  const inactive = (l, e) => found.share[l][e] < found.inactiveBelow;

  const map = remoe.figure("experts", "expert-load", "Load of each expert",
    `Share of the tokens that each expert processes: a row for each layer, a column for each expert. The target is ${percent(target)} ` +
    "on average. × marks inactive experts, which have less than an eighth of that. Select an expert to see its card.",
    () => cells([...names, "share of the tokens"], (l, e) => [found.share[l][e]]));
  const loads = remoe.heatmap(map, {
    rows: layers, columns: experts, value: (l, e) => found.share[l][e], max: Math.max(...found.share.flat()),
    rowTick: (l) => `layer ${l}`, columnTick: String, columnLabel: "expert", format: percent, unit: "of the tokens",
    mark: inactive,
    describe: (l, e) => `Layer ${l}, expert ${e}: ${percent(found.share[l][e])} of the tokens${inactive(l, e) ? ", inactive" : ""}`,
    choose: (l, e) => open(l, e, true),
  });

  const card = element("article", undefined, { class: "card", id: "card", tabindex: -1, "aria-label": "Card of an expert" });
  const layer = choice("Layer", remoe.layerNames, (value) => open(+value, +expert.select.value, true));
  const expert = choice("Expert", range(experts).map((e) => [e, e]), (value) => open(+layer.select.value, +value, true));
  const choices = element("div", undefined, { class: "tools" });
  choices.append(layer.label, expert.label);
  const holder = element("section", undefined, { id: "cards", "aria-labelledby": "cards-title" });
  holder.append(element("h3", "Card of an expert", { id: "cards-title" }), choices, card);
  document.getElementById("experts").append(holder);

  function bar(name, value, highest) {
    const row = element("div", undefined, { class: "bar" });
    const size = element("i");
    size.style.setProperty("--size", highest > 0 ? value / highest : 0);
    row.append(element("span", name), size, element("b", percent(value)));
    return row;
  }

  function others(ofLayer, list) {
    const line = element("span", list.length ? undefined : "none");
    list.forEach(([e, share], i) => {
      line.append(i ? ", " : "", element("a", `${e}`, { href: `#expert-${ofLayer}-${e}` }), ` (${percent(share)})`);
    });
    return line;
  }

  function part(title, ...parts) {
    const made = element("div", undefined, { class: "part" });
    made.append(element("h4", title), ...parts);
    return made;
  }

  const oneLine = (text) => text.replace(/\s+/g, " ");

  function contexts(l, e) {
    const list = element("ul", undefined, { class: "contexts" });
    for (const [before, token, after, gate] of found.contexts[l][e]) {
      const item = element("li");
      const text = element("bdi");
      text.append(oneLine(before), element("code", visible(token)), oneLine(after));
      item.append(text, ` (${short(gate)})`);
      list.append(item);
    }
    return list.children.length ? [part("Tokens with its largest gates, in their context", list)] : [];
  }

  let drawn = null; // of the card that is open

  function course(l, e) {
    if (!load) return;
    if (drawn) drawn.destroy();
    const [, , count] = load.share.shape;
    const start = (l * experts + e) * count;
    const values = loadShare.subarray(start, start + count);
    const figure = remoe.figure("card", "card-load", "Load over training",
      "Share of the tokens that the expert took at each step of training; means over the steps of a point.",
      () => [["step", "share of the tokens"], ...range(count).map((i) => [loadSteps[i], values[i]])]);
    drawn = remoe.lines(figure, {
      x: loadSteps, xName: "step", names: ["share of the tokens"], values: [values], unit: "share of the tokens", target,
      stages: data.training.stages,
    });
  }

  function open(l, e, follow) {
    layer.select.value = l;
    expert.select.value = e;
    loads.select(l, e);
    const shares = found.domainShare.map((share) => share[l][e]);
    const head = element("h4", `Layer ${l}, expert ${e}`, { class: "name" });
    const colour = element("button", "Colour the text by it", { type: "button" });
    colour.addEventListener("click", () => remoe.colourBy(l, e));
    const link = element("a", "link to this card", { href: `#expert-${l}-${e}` });
    const line = element("p", `Takes ${percent(found.share[l][e])} of the tokens${inactive(l, e) ? " and counts as inactive" : ""}. `);
    line.append(link, " ");
    if (remoe.colourBy) line.append(colour);
    const tops = (found.top[l] || [])[e] || [];
    const tokens = element("p", tops.length ? undefined : "none of the frequent tokens");
    for (const text of tops) tokens.append(element("code", visible(text), { dir: "auto" }), " ");
    const parts = [
      part("Share of each domain's tokens", ...found.domains.map((name, i) => bar(name, shares[i], Math.max(...shares)))),
      part("Tokens most likely to be sent to it", tokens),
      part("Experts with the most similar tokens (tokens of both over tokens of either)", others(l, found.near[l][e])),
    ];
    if (found.next[l]) parts.push(part(`Experts of its tokens in layer ${l + 1}`, others(l + 1, found.next[l][e])));
    if (found.effect) {
      const each = found.effect.domains.map((name, i) => `${name} ${nats(found.effect.byDomain[i][l][e])}`).join(", ");
      parts.push(part(`Change of the loss if it is switched off, on ${onTokens}`, element("p", `${nats(found.effect.all[l][e])} nats per token (${each})`)));
    }
    const grid = element("div", undefined, { class: "parts" });
    grid.append(...parts, ...contexts(l, e));
    card.replaceChildren(head, line, grid);
    course(l, e);
    if (follow) history.replaceState(null, "", `#expert-${l}-${e}`);
  }

  function follow() {
    const [, l, e] = location.hash.match(/^#expert-(\d+)-(\d+)$/) || [];
    if (l === undefined || +l >= layers || +e >= experts) return;
    open(+l, +e);
    holder.scrollIntoView();
    card.focus({ preventScroll: true });
  }

  if (found.effect) {
    const highest = Math.max(...found.effect.all.flat(), 1e-9);
    const effects = remoe.figure("experts", "expert-effect", "Effect of each expert",
      `How much the loss rises if the expert is switched off, in nats per token, measured on ${onTokens} ` +
      `(${found.effect.domains.map((name, i) => `${name} ${found.effect.domainTokens[i].toLocaleString("en")}`).join(", ")}). ` +
      "An expert whose effect is negative has the colour of zero.",
      () => cells([...names, "effect in nats", ...found.effect.domains], (l, e) => [found.effect.all[l][e], ...found.effect.byDomain.map((one) => one[l][e])]));
    remoe.heatmap(effects, {
      rows: layers, columns: experts, value: (l, e) => found.effect.all[l][e], max: highest, rowTick: (l) => `layer ${l}`,
      columnTick: String, columnLabel: "expert", unit: "nats",
      describe: (l, e) => `Layer ${l}, expert ${e}: ${nats(found.effect.all[l][e])} nats per token`, choose: (l, e) => open(l, e, true),
    });
  }

  const domains = remoe.figure("experts", "expert-domains", "Experts by domain",
    "Share of each domain's tokens that each expert of a layer takes. An expert whose share differs between domains is a specialist.",
    () => [["domain", ...names, "share of the domain's tokens"],
      ...found.domains.flatMap((name, i) => range(layers).flatMap((l) => range(experts).map((e) => [name, l, e, found.domainShare[i][l][e]])))]);
  const shareOf = (l) => ({ value: (i, e) => found.domainShare[i][l][e], max: Math.max(...found.domainShare.flatMap((one) => one[l])) });
  let shown = layers - 1;
  const byDomain = remoe.heatmap(domains, {
    rows: found.domains.length, columns: experts, ...shareOf(shown), rowTick: (i) => found.domains[i].slice(0, 8), columnTick: String,
    columnLabel: "expert", format: percent, unit: "of the domain's tokens",
    describe: (i, e) => `${found.domains[i]}, layer ${shown}, expert ${e}: ${percent(found.domainShare[i][shown][e])} of the domain's tokens`,
    choose: (i, e) => open(shown, e, true),
  });
  const ofLayer = choice("Layer", remoe.layerNames, (value) => {
    shown = +value;
    byDomain.set(shareOf(shown));
  });
  ofLayer.select.value = shown;
  domains.tools.prepend(ofLayer.label);

  const { count, active, correlation } = found.frequency;
  if (correlation !== null) {
    const order = range(count.length).sort((a, b) => count[a] - count[b]);
    const x = order.map((i) => count[i]), y = order.map((i) => active[i]);
    const frequency = remoe.figure("experts", "expert-frequency", "Rare and frequent tokens",
      "Each dot is a token id: its mean number of experts per layer against its number of occurrences. The line is the mean over ids whose " +
      "counts are within a factor of two. If it falls to the right, rare tokens get more experts, as the ReMoE paper reports. " +
      `Rank correlation: ${short(correlation)}.`,
      () => [["occurrences", "mean experts per layer"], ...x.map((value, i) => [value, y[i]])]);
    const octave = x.map((value) => Math.floor(Math.log2(value)));
    const sums = new Map();
    octave.forEach((at, i) => sums.set(at, [(sums.get(at) || [0, 0])[0] + y[i], (sums.get(at) || [0, 0])[1] + 1]));
    const last = new Map(octave.map((at, i) => [at, i]));
    const means = octave.map((at, i) => (last.get(at) === i ? sums.get(at)[0] / sums.get(at)[1] : NaN));
    remoe.lines(frequency, {
      x, xName: "occurrences", names: ["token id", "mean of ids of similar counts"], values: [y, means], unit: "experts per layer",
      logX: true, dots: [true, false],
    });
  }

  open(0, found.share[0].indexOf(Math.max(...found.share[0])));
  addEventListener("hashchange", follow);
  addEventListener("click", ({ target }) => { // a link to where one is already changes no hash
    const to = target.closest("a[href^='#expert-']");
    if (to && to.hash === location.hash) follow();
  });
  follow();
})();
