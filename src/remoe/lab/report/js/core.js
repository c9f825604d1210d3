"use strict";
// What the parts of the page share: its data, elements, numbers, figures with their CSV, and the theme.
const remoe = (() => {
  const data = JSON.parse(document.getElementById("content").textContent);
  const listeners = new Set();

  // The numbers of a packed array, and its shape
  // The numbers of a packed array; packed.py says what it has
  function unpack(packed) {
    const text = atob(packed.data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    if (packed.type === "uint32") return new Uint32Array(bytes.buffer);
    if (packed.type === "float32") return new Float32Array(bytes.buffer);
    const numbers = wholeNumbers(bytes, packed.width, packed.shape.reduce((product, size) => product * size, 1));
    if (packed.type === "bits") return numbers;
    const known = new Float32Array(Uint32Array.from(packed.values, (value) => value << 16).buffer);
    return Float32Array.from(numbers, (place) => known[place]);
  }

  function wholeNumbers(bytes, width, count) {
    const numbers = new (width <= 8 ? Uint8Array : width <= 16 ? Uint16Array : Uint32Array)(count);
    const mask = 2 ** width - 1;
    let left = 0, bits = 0; // of the bytes before: how many bits are left, and they
    for (let i = 0, next = 0; i < count; i++) {
      for (; left < width; left += 8) bits |= bytes[next++] << left;
      numbers[i] = bits & mask;
      bits >>>= width;
      left -= width;
    }
    return numbers;
  }

  // The rows of a packed array of two dimensions
  function rowsOf(packed) {
    const flat = unpack(packed);
    const [rows, columns] = packed.shape;
    return Array.from({ length: rows }, (_, i) => flat.subarray(i * columns, (i + 1) * columns));
  }

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  const range = (count) => Array.from({ length: count }, (_, i) => i);

  function percent(share) {
    const digits = share >= 0.0995 ? 0 : share >= 0.00995 ? 1 : 2;
    return `${(100 * share).toFixed(digits)} %`;
  }

  // A number with three significant digits
  function short(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return Number(value.toPrecision(size >= 100 ? 4 : 3)).toLocaleString("en");
  }

  // White space as visible signs; a long run becomes one sign and a count
  function visible(text) {
    const signs = { "\n": "⏎", "\t": "⇥", " ": "␣" };
    return text.replace(/([\n\t ])\1*/g, (run) => {
      const sign = signs[run[0]];
      return run.length > 3 ? `${sign}×${run.length}` : sign.repeat(run.length);
    });
  }

  // A labelled choice; `options` are [value, name]
  function choice(name, options, choose) {
    const label = element("label", `${name} `);
    const select = element("select", undefined, { "aria-label": name });
    for (const [value, text] of options) select.append(element("option", text, { value }));
    select.addEventListener("change", () => choose(select.value));
    label.append(select);
    return { label, select };
  }

  const quoted = (cell) => {
    const text = cell === null || cell === undefined || Number.isNaN(cell) ? "" : String(cell);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };

  // Writes the rows in slices, so that the page answers meanwhile
  async function download(name, rows) {
    const parts = [];
    let lines = [], since = performance.now();
    for (const row of rows) {
      lines.push(row.map(quoted).join(","), "\r\n");
      if (lines.length % 128 === 0 && performance.now() - since > 40) {
        parts.push(lines.join(""));
        lines = [];
        await new Promise((goOn) => setTimeout(goOn));
        since = performance.now();
      }
    }
    parts.push(lines.join(""));
    const url = URL.createObjectURL(new Blob(parts, { type: "text/csv" }));
    element("a", "", { href: url, download: `${name}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // A figure with heading, words, tools and a body; `rows` returns its data, an array or iterator with a row of names first
  function figure(place, id, title, words, rows) {
    const made = element("figure", undefined, { class: "plot", id });
    const caption = element("figcaption");
    caption.append(element("h3", title), element("p", words));
    const tools = element("div", undefined, { class: "tools" });
    const button = element("button", "CSV", { type: "button", class: "csv", "aria-label": `${title}: data as CSV` });
    button.addEventListener("click", () => download(id, rows()));
    tools.append(button);
    const body = element("div", undefined, { class: "body" });
    made.append(caption, tools, body);
    document.getElementById(place).append(made);
    return { figure: made, tools, body, words: caption.lastChild, title };
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // Calls again whenever the colours or the width change, until the function that it returns is called
  function onTheme(redraw) {
    listeners.add(redraw);
    return () => listeners.delete(redraw);
  }
  function retheme() {
    for (const redraw of listeners) redraw();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
  for (const [event, print] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      document.documentElement.classList.toggle("print", print);
      retheme();
    });
  }

  const layers = data.head.layers || 0;
  const layerNames = range(layers).map((layer) => [layer, `layer ${layer}`]);
  return {
    data, unpack, rowsOf, element, range, percent, short, visible, choice, figure, colour, onTheme, layerNames,
  };
})();
