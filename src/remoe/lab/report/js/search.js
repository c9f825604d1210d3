"use strict";
// Reading a long text: a search field, and the keys that move from token to token.

// options: text() has `joined`, the text in lower case, and `ends`, where its tokens end there; show(token) brings a
// token into view; remark() colours the tokens in view again.
// Returned: controls, to be put into the page; marks(token), whether it belongs to the present hit; clear().
remoe.search = (options) => {
  const { element } = remoe;
  const label = element("label", "Search ");
  const field = element("input", undefined, { type: "search", id: "search", autocomplete: "off", spellcheck: "false" });
  label.append(field);
  const back = element("button", "Previous", { type: "button" });
  const next = element("button", "Next", { type: "button" });
  const said = element("span", "", { id: "hits", "aria-live": "polite" });
  let hits = [], hit = -1;

  function tokenAt(place) {
    const { ends } = options.text();
    let low = 0, high = ends.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > place) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  function find() {
    const { joined } = options.text(), wanted = field.value.toLowerCase();
    hits = [];
    hit = -1;
    if (wanted) {
      for (let at = joined.indexOf(wanted); at >= 0; at = joined.indexOf(wanted, at + wanted.length)) {
        hits.push([tokenAt(at), tokenAt(at + wanted.length - 1)]);
      }
    }
    if (hits.length) go(0);
    else {
      options.remark();
      said.textContent = wanted ? "not found" : "";
    }
  }
  function go(number) {
    if (!hits.length) return;
    hit = (number + hits.length) % hits.length;
    said.textContent = `${(hit + 1).toLocaleString("en")} of ${hits.length.toLocaleString("en")}`;
    options.show(hits[hit][0]);
    options.remark();
  }
  field.addEventListener("input", find);
  field.addEventListener("keydown", (event) => event.key === "Enter" && go(hit + (event.shiftKey ? -1 : 1)));
  back.addEventListener("click", () => go(hit - 1));
  next.addEventListener("click", () => go(hit + 1));
  return {
    controls: [label, back, next, said],
    marks: (token) => hit >= 0 && hits[hit][0] <= token && token <= hits[hit][1],
    clear: () => {
      hits = [];
      hit = -1;
      said.textContent = "";
    },
  };
};

// Left, Right (with Control by 100), Home and End in a box; count() is the number of tokens, at() the present one.
remoe.tokenKeys = (box, count, at, show) => box.addEventListener("keydown", (event) => {
  const far = event.ctrlKey ? 100 : 1;
  const step = { ArrowRight: far, ArrowLeft: -far }[event.key];
  const to = { Home: 0, End: count() - 1 }[event.key] ?? (step && Math.max(0, Math.min(count() - 1, at() + step)));
  if (to === undefined) return;
  event.preventDefault();
  show(to);
});
