"use strict";
// The table of measures, with the difference of each model to the reference.
(() => {
  const { data, element, models, named } = remoe;
  const rows = data.measures;
  if (!rows || !rows.length) return;
  // Decimals of a row: none for whole and for large numbers, more for small ones
  function decimals(values) {
    const known = values.filter((value) => value !== null), most = Math.max(...known.map(Math.abs));
    return known.every(Number.isInteger) || most >= 100 ? 0 : most >= 0.1 ? 3 : most >= 0.01 ? 4 : 5;
  }
  const shown = (value, digits) => (value === null ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  const difference = (values, i) => (values[i] === null || values[0] === null ? null : values[i] - values[0]);
  function signed(value, digits) {
    if (value === null) return "–";
    const size = shown(Math.abs(value), digits);
    return `${!/[1-9]/.test(size) ? "±" : value > 0 ? "+" : "−"}${size}`;
  }
  const cells = (values) => models.flatMap((_, i) => (i ? [values[i], difference(values, i)] : [values[0]]));
  const minus = models.map((model) => `${model.name} − ${models[0].name}`);
  const names = models.flatMap((model, i) => (i ? [model.name, minus[i]] : [model.name]));
  const figure = remoe.figure("measures", "measures-table", "Measures and differences",
    `Each row is a measure; the column after a model has its difference to ${models[0].name}. A dash is a value that is not known. ` +
    "Averages over layers count each layer in proportion to its pairs of token and expert.",
    () => [["measure", ...names], ...rows.map((row) => [row.name, ...cells(row.values)])]);
  const table = element("table", undefined, { class: "numbers measures" });
  const head = element("thead"), top = element("tr"), body = element("tbody");
  top.append(element("th", "measure", { scope: "col" }));
  models.forEach((_, i) => {
    const name = named("th", i);
    name.setAttribute("scope", "col");
    top.append(name);
    if (i) top.append(element("th", "difference", { scope: "col" }));
  });
  head.append(top);
  for (const { name, words, values } of rows) {
    const row = element("tr"), title = element("th", name, { scope: "row" });
    title.append(element("span", words));
    row.append(title);
    const digits = decimals(values);
    values.forEach((value, i) => {
      row.append(element("td", shown(value, digits)));
      if (i) row.append(element("td", signed(difference(values, i), digits)));
    });
    body.append(row);
  }
  table.append(head, body);
  const scroll = element("div", undefined, { class: "scroll", tabindex: 0, role: "group", "aria-label": "Measures and differences" });
  scroll.append(table);
  figure.body.append(scroll);
})();
