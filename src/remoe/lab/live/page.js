"use strict";
// Asks the server for what is new, and draws it. All texts are set as text, never as HTML.

const PLOTS = [
  {title: "Loss", note: "Language model loss, nats per token; dots: validation.", column: 1, dots: true},
  {title: "Sparsity S", note: "Share of inactive pairs of token and expert; dashed: the target.", column: 2, target: true},
  {title: "Coefficient \u03bb", note: "Coefficient of the penalty on the gates, logarithmic.", column: 3, log: true},
  {title: "Throughput", note: "Tokens per second of each step.", column: 4},
];
const WIDTH = 420, HEIGHT = 220, LEFT = 56, BOTTOM = 24, TOP = 8, RIGHT = 8;
const EVERY = 1000, LATER = 10000;  // milliseconds to the next question, and after one without an answer
const MOST_ROWS = 6000;  // kept by the page

const seen = {epoch: 0, rows: [], validation: []};

function element(parent, name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function drawn(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
}

function short(value) {
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function plot(figure, one, data) {
  const scale = one.log ? Math.log10 : value => value;
  const points = seen.rows.filter(row => row[one.column] !== null && (!one.log || row[one.column] > 0))
    .map(row => [row[0], scale(row[one.column])]);
  const dots = one.dots ? seen.validation : [];
  const svg = figure.querySelector("svg");
  svg.replaceChildren();
  const values = [...points, ...dots].map(point => point[1]);
  if (one.target && data.target !== null) values.push(data.target);
  if (!points.length) {
    drawn(svg, "text", {x: LEFT, y: HEIGHT / 2}, "nothing recorded yet");
    return;
  }
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (high - low < 1e-12) { low -= 0.5; high += 0.5; }
  const last = Math.max(points[points.length - 1][0], 2);
  const x = step => LEFT + (step - 1) / (last - 1) * (WIDTH - LEFT - RIGHT);
  const y = value => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
  drawn(svg, "path", {class: "axis", fill: "none", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}`});
  for (const value of [low, (low + high) / 2, high]) {
    const shown = short(one.log ? 10 ** value : value);
    drawn(svg, "text", {x: LEFT - 4, y: y(value) + 4, "text-anchor": "end"}, shown);
  }
  drawn(svg, "text", {x: LEFT, y: HEIGHT - 6}, "step 1");
  drawn(svg, "text", {x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end"}, last.toLocaleString("en"));
  if (one.target && data.target !== null) {
    drawn(svg, "path", {class: "target", d: `M${LEFT} ${y(data.target)}H${WIDTH - RIGHT}`});
  }
  drawn(svg, "polyline", {class: "curve", points: points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ")});
  for (const [step, value] of dots) drawn(svg, "circle", {class: "dot", r: 3, cx: x(step), cy: y(value)});
  const now = points[points.length - 1][1];
  svg.setAttribute("aria-label", `${one.title} at step ${last}: ${short(one.log ? 10 ** now : now)}`);
}

function load(data) {
  const section = document.getElementById("load"), cells = document.getElementById("cells");
  section.hidden = !data.load.length;
  cells.replaceChildren();
  data.load.forEach((shares, layer) => {
    const row = element(cells, "div");
    row.className = "layer";
    element(row, "span", `layer ${layer}`);
    shares.forEach((share, expert) => {
      const cell = element(row, "i");
      const target = 1 - data.target;
      const strength = Math.max(0.06, Math.min(1, Math.sqrt(share / Math.min(1, 4 * target))));
      cell.style.setProperty("--strength", strength);  // of the fill alone, so that a frame stays visible
      cell.className = share < target / 8 ? "few" : "";
      cell.title = `layer ${layer}, expert ${expert}: ${(100 * share).toPrecision(3)} % of the tokens`;
    });
  });
}

function show(data) {
  document.title = `${data.name}: ${data.state}`;
  document.getElementById("name").textContent = data.name;
  if (document.getElementById("state").textContent !== data.words[0]) {
    document.getElementById("state").textContent = data.words[0];
  }
  document.getElementById("more").replaceChildren();
  for (const sentence of data.words.slice(1)) element(document.getElementById("more"), "p", sentence);
  PLOTS.forEach((one, index) => plot(document.getElementById("plots").children[index], one, data));
  load(data);
}

async function ask() {
  const after = seen.rows.length ? seen.rows[seen.rows.length - 1][0] : 0;
  try {
    const answer = await fetch(`data?epoch=${seen.epoch}&after=${after}`);
    const data = await answer.json();
    if (data.epoch !== seen.epoch) Object.assign(seen, {epoch: data.epoch, rows: [], validation: []});
    if (seen.rows.length > MOST_ROWS) Object.assign(seen, {epoch: 0});  // the next answer has them all, thinned
    const fresh = data.rows.length || data.state !== seen.state || data.words[0] !== seen.words;
    seen.rows.push(...data.rows);
    seen.validation.push(...data.validation);
    Object.assign(seen, {state: data.state, words: data.words[0]});
    if (fresh) show(data);
  } catch (error) {
    document.getElementById("state").textContent =
      "The program that served this page has ended. What is below is the last that it sent; " +
      "`remoe watch RUN` shows the run again.";
    seen.state = "";
    setTimeout(ask, LATER);
    return;
  }
  setTimeout(ask, EVERY);
}

for (const one of PLOTS) {
  const figure = element(document.getElementById("plots"), "figure");
  element(figure, "h2", one.title);
  element(figure, "p", one.note);
  drawn(figure, "svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img"});
}
ask();
