"use strict";
// Colours the text by the number of experts of each token, or by the gate of one selected expert.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  if (!content.excerpts) return;
  const ALL = -1;
  const layers = content.domainShare[0].length;
  const state = { domain: 0, layer: ALL, chosen: null, token: 0 };
  const $ = (id) => document.getElementById(id);

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // (expert, gate) pairs of a token in a layer
  function pairs(excerpt, layer, token) {
    const flat = excerpt.gates[layer][token];
    return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
  }

  // The value that colours each token: its number of experts, or the size of the selected expert's gate (null if inactive)
  function values(excerpt) {
    if (state.chosen) {
      const { layer, expert } = state.chosen;
      return excerpt.tokens.map((_, token) => {
        const found = pairs(excerpt, layer, token).find(([e]) => e === expert);
        return found ? Math.abs(found[1]) : null;
      });
    }
    const shown = state.layer === ALL ? [...Array(layers).keys()] : [state.layer];
    return excerpt.tokens.map((_, token) => shown.reduce((sum, layer) => sum + excerpt.gates[layer][token].length / 2, 0));
  }

  function percent(share) {
    const digits = share >= 0.0995 ? 0 : share >= 0.00995 ? 1 : 2;
    return (100 * share).toFixed(digits);
  }

  // White space as visible signs; a long run becomes one sign and a count
  function visible(text) {
    const signs = { "\n": "⏎", "\t": "⇥", " ": "␣" };
    return text.replace(/([\n\t ])\1*/g, (run) => {
      const sign = signs[run[0]];
      return run.length > 3 ? `${sign}×${run.length}` : sign.repeat(run.length);
    });
  }

  function choice(place, names, choose) {
    $(place).replaceChildren(...names.map(([value, name]) => {
      const button = element("button", name, { "data-value": value });
      button.addEventListener("click", () => choose(value));
      return button;
    }));
  }

  function press(place, current) {
    for (const button of $(place).children) {
      button.setAttribute("aria-pressed", String(+button.dataset.value === current));
    }
  }

  function showText() {
    const excerpt = content.excerpts[state.domain];
    const found = values(excerpt);
    const highest = Math.max(...found);
    $("excerpt").replaceChildren(...excerpt.tokens.map((text, token) => {
      const span = element("span", text, { "data-token": token });
      span.style.setProperty("--strength", highest > 0 ? (found[token] / highest).toFixed(3) : 0);
      return span;
    }));
    if (state.chosen) {
      const taken = found.filter((value) => value !== null).length;
      const most = taken && content.gatesKnown ? ` The strongest colour is a gate of size ${highest}.` : "";
      $("scale").textContent = `Colour: gate of expert ${state.chosen.expert} in layer ${state.chosen.layer}, ` +
        `which takes ${taken} of these ${found.length} tokens.${most}`;
    } else {
      const where = state.layer === ALL ? "summed over all layers" : `in layer ${state.layer}`;
      const mean = found.reduce((a, b) => a + b, 0) / found.length;
      $("scale").textContent = `Colour: number of experts per token, ${where}: ` +
        `${mean.toFixed(2)} on average, from ${Math.min(...found)} to ${highest} (strongest colour).`;
    }
  }

  function showToken() {
    const excerpt = content.excerpts[state.domain];
    const title = element("div");
    title.append(element("span", visible(excerpt.tokens[state.token]) || "part of a character", { class: "token", dir: "auto" }));
    const list = element("ul");
    for (let layer = 0; layer < layers; layer++) {
      const row = element("li", undefined, { class: "row" });
      const found = pairs(excerpt, layer, state.token).sort((a, b) => b[1] - a[1]);
      const words = found.map(([expert, gate]) => content.gatesKnown ? `${expert} (${gate ?? "not a number"})` : `${expert}`).join(", ");
      const noun = found.length > 1 ? "experts" : "expert";
      row.append(element("span", `layer ${layer}`), element("span", words ? `${noun} ${words}` : "none"));
      list.append(row);
    }
    $("token").replaceChildren(title, list);
    for (const span of document.querySelectorAll("#excerpt [data-token]")) {
      span.classList.toggle("here", +span.dataset.token === state.token);
    }
  }

  function bar(name, value, highest) {
    const row = element("div", undefined, { class: "bar" });
    const size = element("i");
    size.style.setProperty("--size", highest > 0 ? value / highest : 0);
    row.append(element("span", name), size, element("b", `${percent(value)} %`));
    return row;
  }

  // Experts of similar tokens, and those that follow in the next layer
  function goesWith(layer, expert) {
    const words = (found) => found.map(([e, share]) => `${e} (${percent(share)} %)`).join(", ");
    const rows = [["Also active for its tokens, by tokens of both over tokens of either: ", content.near[layer][expert]]];
    if (content.next[layer]) rows.push([`Its tokens' experts in layer ${layer + 1}: `, content.next[layer][expert]]);
    return rows.map(([name, found]) => element("p", name + (found.length ? words(found) : "none")));
  }

  const oneLine = (text) => text.replace(/\s+/g, " ");

  function contexts(layer, expert) {
    const found = content.contexts[layer][expert];
    if (!found.length) return [];
    const list = element("ul", undefined, { class: "contexts" });
    for (const [before, token, after, gate] of found) {
      const item = element("li", undefined, { dir: "auto" });
      item.append(oneLine(before), element("code", visible(token)), `${oneLine(after)} (${gate})`);
      list.append(item);
    }
    return [element("p", "Tokens with its largest gates, in their context:"), list];
  }

  function effect(layer, expert) {
    if (!content.effect) return [];
    const nats = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value)}`;
    const domains = content.effect.domains.map((name, i) => `${name} ${nats(content.effect.byDomain[i][layer][expert])}`);
    const all = nats(content.effect.all[layer][expert]);
    return [element("p", `Loss if it is switched off: ${all} nats per token (${domains.join(", ")}).`)];
  }

  function showExpert() {
    const panel = $("expert");
    for (const button of document.querySelectorAll(".map button")) {
      const { layer, expert } = state.chosen || {};
      button.setAttribute("aria-pressed", String(+button.dataset.layer === layer && +button.dataset.expert === expert));
    }
    if (!state.chosen) {
      panel.replaceChildren(element("span", "Select an expert in the map."));
      return;
    }
    const { layer, expert } = state.chosen;
    const parts = [element("strong", `Layer ${layer}, expert ${expert}`), element("p", "Share of each domain's tokens that it takes:")];
    const shares = content.domainShare.map((share) => share[layer][expert]);
    content.domains.forEach((domain, i) => parts.push(bar(domain, shares[i], Math.max(...shares))));
    const tops = (content.top[layer] || [])[expert] || [];
    parts.push(element("p", tops.length ? "Tokens most likely to be sent to it:" : "It takes none of the frequent tokens."));
    const list = element("ul");
    const item = element("li");
    for (const text of tops) item.append(element("code", visible(text)), " ");
    list.append(item);
    panel.replaceChildren(...parts, list, ...goesWith(layer, expert), ...contexts(layer, expert), ...effect(layer, expert));
  }

  // The token shown before the reader points at one: the first would often be an empty line.
  function busiest(domain) {
    const excerpt = content.excerpts[domain];
    const counts = excerpt.tokens.map((_, token) => {
      let count = 0;
      for (let layer = 0; layer < layers; layer++) count += pairs(excerpt, layer, token).length;
      return count;
    });
    return counts.indexOf(Math.max(...counts));
  }

  function show() {
    press("layers", state.chosen ? state.chosen.layer : state.layer);
    press("domains", state.domain);
    showText();
    showToken();
    showExpert();
  }

  function point(event) {
    const span = event.target.closest("[data-token]");
    if (!span) return;
    state.token = +span.dataset.token;
    showToken();
  }

  $("excerpt").addEventListener("mouseover", point);
  $("excerpt").addEventListener("click", point);
  $("excerpt").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const count = content.excerpts[state.domain].tokens.length;
    state.token = (state.token + step + count) % count;
    showToken();
    document.querySelector("#excerpt .here").scrollIntoView({ block: "nearest" });
  });
  for (const button of document.querySelectorAll(".map button")) {
    button.addEventListener("click", () => {
      const again = button.getAttribute("aria-pressed") === "true";
      state.chosen = again ? null : { layer: +button.dataset.layer, expert: +button.dataset.expert };
      show();
    });
  }
  const names = [[ALL, "all layers"], ...Array.from({ length: layers }, (_, layer) => [layer, `layer ${layer}`])];
  choice("layers", names, (layer) => {
    state.layer = layer;
    state.chosen = null;
    show();
  });
  choice("domains", content.excerpts.map(({ domain }, i) => [i, domain]), (domain) => {
    state.domain = domain;
    state.token = busiest(domain);
    show();
  });
  state.token = busiest(state.domain);
  show();
})();
