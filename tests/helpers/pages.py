"""What tests run in a report's page and check of it."""

WHITE, DARK = "rgb(255, 255, 255)", "rgb(21, 24, 28)"
# Texts that try to end a script, run one, turn the line round, steer a terminal or be very wide
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\u202e\u2066", "\x00\x1b[31m\x9b",
           "א", "x" * 1_000_000, "\ufffd", "\u2028", "${alert(3)}", "{{ 7 * 7 }}"]  # fmt: skip

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


def colour_of(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def check_printed_on_white(page):
    """A page in the dark is printed on white, and dark again afterwards."""
    page.evaluate(
        "addEventListener('beforeprint', () => { window.paper = getComputedStyle(document.body).backgroundColor })"
    )
    assert colour_of(page) == DARK
    assert page.pdf().startswith(b"%PDF")
    assert page.evaluate("window.paper") == WHITE
    assert colour_of(page) == DARK
