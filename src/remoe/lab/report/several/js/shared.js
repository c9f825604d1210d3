"use strict";
// What the parts of a comparison share: the models, and maps and curves of several of them.
(() => {
  const { data, element, range } = remoe;
  const { models, routed } = data.head;
  remoe.models = models;
  remoe.routed = routed.map((number) => ({ ...models[number], number }));
  remoe.named = (name, number, text) => element(name, text === undefined ? models[number].name : text, { class: `name-${number}` });

  // A map for each model with routing, side by side, with one scale of colours; `options` makes those of a map
  remoe.maps = (figure, options) => {
    const place = element("div", undefined, { class: "beside" });
    figure.body.append(place);
    return remoe.routed.map((model, i) => {
      const holder = element("div"), body = element("div");
      holder.append(remoe.named("h4", model.number), body);
      place.append(holder);
      return remoe.heatmap({ title: `${figure.title}, ${model.name}`, body }, options(model, i));
    });
  };

  // Curves of several models over one x: `series` are {number, x, values}, in the order of x
  remoe.joined = (series) => {
    const x = [...new Set(series.flatMap((one) => [...one.x]))].sort((a, b) => a - b);
    const place = new Map(x.map((value, i) => [value, i]));
    const values = series.map((one) => {
      const row = new Float64Array(x.length).fill(NaN);
      one.x.forEach((value, i) => (row[place.get(value)] = one.values[i] ?? NaN));
      return row;
    });
    return { x, values, names: series.map((one) => models[one.number].name), colours: series.map((one) => one.number) };
  };
  remoe.columns = (first, { x, values, names }) => [[first, ...names], ...range(x.length).map((i) => [x[i], ...values.map((row) => row[i])])];
})();
