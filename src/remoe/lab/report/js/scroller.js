"use strict";
// A long text in a box: of its tokens only those near the visible part are in the page.
// options: mark(span, token) gives a token its look, point(token) is called for the token that is pointed at or clicked.
remoe.scroller = (box, options) => {
  const { element, range } = remoe;
  const FEW = 60, MANY = 160; // tokens of a piece: it ends at the first line end after FEW, or at MANY
  const NEAR = "600px"; // pieces so far from the visible part are filled
  let tokens = [], pieces = [], watcher = null;

  function cut() {
    const bounds = [];
    let first = 0;
    tokens.forEach((token, t) => {
      const size = t - first + 1;
      if (t === tokens.length - 1 || size >= MANY || (size >= FEW && token.endsWith("\n"))) {
        bounds.push([first, t + 1]);
        first = t + 1;
      }
    });
    return bounds;
  }

  function fill(piece) {
    if (piece.filled) return;
    piece.filled = true;
    piece.box.style.minHeight = "";
    piece.box.replaceChildren(...range(piece.end - piece.first).map((i) => {
      const span = element("span", tokens[piece.first + i]);
      options.mark(span, piece.first + i);
      return span;
    }));
  }

  function empty(piece) {
    if (!piece.filled) return;
    piece.filled = false;
    piece.box.style.minHeight = `${piece.box.offsetHeight}px`;
    piece.box.replaceChildren();
  }

  const pieceOf = (token) => pieces.find((piece) => token < piece.end);

  function spanOf(token) {
    const piece = pieceOf(token);
    return piece && piece.filled ? piece.box.children[token - piece.first] : null;
  }

  // Scrolls the text alone, not the page
  function reveal(span) {
    const place = box.getBoundingClientRect(), at = span.getBoundingClientRect();
    if (at.top < place.top + 20 || at.bottom > place.bottom - 20) box.scrollTop += at.top - place.top - place.height / 2;
  }

  function pointed(event) {
    const piece = pieces.find((one) => one.box === event.target.parentElement);
    if (piece) options.point(piece.first + [...piece.box.children].indexOf(event.target));
  }
  box.addEventListener("mouseover", pointed);
  box.addEventListener("click", pointed);

  return {
    // Shows another text
    lay(changed) {
      tokens = changed;
      if (watcher) watcher.disconnect();
      const columns = Math.max(20, (box.clientWidth - 32) / 8.7);
      pieces = cut().map(([first, end]) => {
        const made = element("div", undefined, { class: "piece" });
        const lines = tokens.slice(first, end).join("").split("\n");
        const rows = lines.reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
        made.style.minHeight = `${rows * 27}px`;
        return { box: made, first, end, filled: false };
      });
      const of = new Map(pieces.map((piece) => [piece.box, piece]));
      watcher = new IntersectionObserver((entries) => {
        for (const entry of entries) (entry.isIntersecting ? fill : empty)(of.get(entry.target));
      }, { root: box, rootMargin: NEAR });
      box.replaceChildren(...pieces.map((piece) => piece.box));
      box.scrollTop = 0;
      pieces.slice(0, 3).forEach(fill);
      pieces.forEach((piece) => watcher.observe(piece.box));
    },
    // Gives all tokens their look again, or one
    remark(token) {
      if (token !== undefined) {
        const span = spanOf(token);
        if (span) options.mark(span, token);
        return;
      }
      for (const piece of pieces) {
        if (piece.filled) [...piece.box.children].forEach((span, i) => options.mark(span, piece.first + i));
      }
    },
    // Scrolls to a token
    reveal(token) {
      fill(pieceOf(token));
      reveal(spanOf(token));
    },
  };
};
