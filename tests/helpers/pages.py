"""Scripts that tests run in a report's page."""

# Of each figure its name, title, words, and the widths of its button and its body
FIGURES = """[...document.querySelectorAll("figure.plot")].map((one) => [
  one.id, one.querySelector("h3").textContent, one.querySelector("figcaption p").textContent,
  one.querySelector(".csv").offsetWidth, one.querySelector(".body").offsetWidth,
])"""
# Presses all CSV buttons, and keeps what they would save; a browser allows a page few downloads
SAVED = """async () => {
  const blobs = [];
  URL.createObjectURL = (blob) => blobs.push(blob) && "#";
  HTMLAnchorElement.prototype.click = () => {};
  const buttons = [...document.querySelectorAll(".csv")];
  buttons.forEach((button) => button.click());
  while (blobs.length < buttons.length) await new Promise((goOn) => setTimeout(goOn, 5));
  return Promise.all(blobs.map((blob) => blob.text()));
}"""


def check_figures(page, number, width):
    """A page has so many figures, each with title, words and button, and none wider than the page."""
    figures = page.evaluate(FIGURES)
    assert len(figures) == number
    for name, title, words, button, body in figures:
        assert title, name
        assert len(words) > 40, name
        assert button > 20, name
        assert 150 < body <= width, name
