"use strict";
// Experts of several models: maps side by side with one scale of colours, and rare and frequent tokens.
(() => {
  const found = remoe.data.experts;
  if (!found) return;
  const { element, range, percent, short, choice, routed } = remoe;
  const { domains, models } = found;
  const layerTick = (l) => `layer ${l}`;

  const load = remoe.figure("experts", "load", "Load of each expert",
    "Share of the tokens that each expert processes: a row for each layer, a column for each expert (Fig. 8 of the paper). Even colours are an even " +
    "load. × marks inactive experts, which have less than an eighth of the target. The colours of all models have one scale.",
    () => [["model", "layer", "expert", "share of the tokens"], ...routed.flatMap((model, i) =>
      models[i].share.flatMap((row, l) => row.map((share, e) => [model.name, l, e, share])))]);
  const highest = Math.max(...models.flatMap((one) => one.share.flat()));
  remoe.maps(load, (model, i) => ({
    rows: model.layers, columns: model.experts, value: (l, e) => models[i].share[l][e], max: highest, rowTick: layerTick, columnTick: String,
    columnLabel: "expert", format: percent, unit: "of the tokens",
    mark: (l, e) => models[i].share[l][e] < models[i].inactiveBelow,
    describe: (l, e) => `Layer ${l}, expert ${e}: ${percent(models[i].share[l][e])} of the tokens`,
  }));

  const byDomain = remoe.figure("experts", "domains", "Experts by domain",
    "Share of each domain's tokens that each expert of a layer takes (Fig. 9 of the paper). A column whose colours differ is an expert that " +
    "specialises in domains.",
    () => [["model", "domain", "layer", "expert", "share of the domain's tokens"], ...routed.flatMap((model, i) => domains.flatMap((name, c) =>
      models[i].domainShare[c].flatMap((row, l) => row.map((share, e) => [model.name, name, l, e, share]))))]);
  const shared = Math.min(...routed.map((model) => model.layers));
  let shown = shared - 1;
  const most = () => Math.max(...models.flatMap((one) => one.domainShare.flatMap((rows) => rows[shown])));
  const maps = remoe.maps(byDomain, (model, i) => ({
    rows: domains.length, columns: model.experts, value: (c, e) => models[i].domainShare[c][shown][e], max: most(), rowTick: (c) => domains[c].slice(0, 8),
    columnTick: String, columnLabel: "expert", format: percent, unit: "of the domain's tokens",
    describe: (c, e) => `${domains[c]}, layer ${shown}, expert ${e}: ${percent(models[i].domainShare[c][shown][e])} of the domain's tokens`,
  }));
  const layer = choice("Layer", range(shared).map((l) => [l, layerTick(l)]), (value) => {
    shown = +value;
    maps.forEach((map) => map.set({ max: most() }));
  });
  layer.select.value = shown;
  byDomain.tools.prepend(layer.label);

  const active = models.map((one) => one.domainShare.map((rows) => rows.map((row) => row.reduce((sum, share) => sum + share, 0))));
  const perDomain = remoe.figure("experts", "domain-active", "Active experts by domain and layer",
    "Mean number of experts of a domain's tokens in each layer (Fig. 12 of the paper). Rows that differ are domains that get more or less compute; " +
    "with TopK all cells are equal.",
    () => [["model", "domain", "layer", "experts per token"], ...routed.flatMap((model, i) => domains.flatMap((name, c) =>
      active[i][c].map((value, l) => [model.name, name, l, value])))]);
  const top = Math.max(...active.flat(2));
  remoe.maps(perDomain, (model, i) => ({
    rows: domains.length, columns: model.layers, value: (c, l) => active[i][c][l], max: top, linear: true, rowTick: (c) => domains[c].slice(0, 8),
    columnTick: String, columnLabel: "layer", unit: "experts",
    describe: (c, l) => `${domains[c]}, layer ${l}: ${short(active[i][c][l])} experts per token`,
  }));

  const numbers = routed.filter((_, i) => models[i].frequency.count.length).map((model) => routed.indexOf(model));
  if (!numbers.length) return;
  const dots = numbers.map((i) => ordered(models[i].frequency.count, models[i].frequency.active));
  const means = numbers.map((i) => ordered(models[i].frequency.at, models[i].frequency.mean));
  const frequency = remoe.figure("experts", "frequency", "Rare and frequent tokens",
    "Mean number of experts of each token id in a layer against its number of occurrences (Fig. 7 of the paper): dots are token ids, lines are means " +
    "of ids whose counts are within a factor of two. A line that falls to the right gives rare tokens more experts.",
    () => [["model", "occurrences", "experts per layer"], ...numbers.flatMap((i, j) => dots[j].map(([x, y]) => [routed[i].name, x, y]))]);
  // An id is a dot, so an x may occur several times
  const all = [...dots.flatMap((list, j) => list.map(([x, y]) => [x, j + numbers.length, y])), ...means.flatMap((list, j) => list.map(([x, y]) => [x, j, y]))];
  all.sort((a, b) => a[0] - b[0]);
  const values = range(2 * numbers.length).map((row) => Float64Array.from(all, ([, of, y]) => (of === row ? y : NaN)));
  remoe.lines(frequency, {
    x: all.map(([x]) => x), xName: "occurrences", values, unit: "experts per layer", logX: true,
    names: [...numbers.map((i) => `${routed[i].name}, mean`), ...numbers.map((i) => `${routed[i].name}, token id`)],
    colours: [...numbers, ...numbers].map((i) => routed[i].number), dots: range(2 * numbers.length).map((row) => row >= numbers.length),
  });

  function ordered(x, y) {
    return x.map((value, i) => [value, y[i]]).sort((a, b) => a[0] - b[0]);
  }
})();
