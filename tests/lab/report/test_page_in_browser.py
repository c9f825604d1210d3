"""The page in a browser: each control does what it says, at every width, in the dark, by keyboard, on paper."""

import csv
import io
import json

import pytest
import torch
from accessible import check_accessible
from pages import DARK, HOSTILE, SAVED, WHITE, check_figures, check_printed_on_white, colour_of
from tiny_run import FLAGS

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.cli.main import main
from remoe.lab.report.course import course_of
from remoe.lab.report.packed import unpacked
from remoe.lab.report.page import render
from remoe.lab.report.sections import page_data
from remoe.lab.training.metrics import read_metrics

pytestmark = pytest.mark.slow

# Charts that answer when the colours change
CHARTS = """() => {
  let charts = 0;
  const redraw = CanvasRenderingContext2D.prototype.clearRect;
  return new Promise((answer) => {
    CanvasRenderingContext2D.prototype.clearRect = function (...box) { charts += 1; return redraw.apply(this, box); };
    dispatchEvent(new Event("beforeprint"));
    requestAnimationFrame(() => requestAnimationFrame(() => answer(charts)));
  });
}"""

# Numbers the controls that one can see and use, and keeps, of each that gets the focus, its number and outline
WATCH_FOCUS = """() => {
  window.focused = [];
  const controls = [...document.querySelectorAll("button, select, input, [tabindex='0'], a[href]")]
    .filter((one) => one.checkVisibility() && !one.disabled);
  addEventListener("focusin", ({ target }) => {
    const { outlineStyle, outlineWidth, outlineColor } = getComputedStyle(target);
    window.focused.push([controls.indexOf(target), outlineStyle, outlineWidth, outlineColor]);
  });
  return controls.map((one) => one.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "run"
    flags = ["--steps", "12", "--validate.flips-every", "2", "--granularity", "2", *FLAGS]
    assert main(["train", "--data", str(corpus), "--out", str(out), *flags]) == 0
    assert main(["report", str(out), "--excerpt", "400", "--effect-tokens", "64", "--dial-tokens", "64"]) == 0
    return out


def content_of(page):
    return json.loads(page.locator("#content").text_content())


def rows_of(page, name, press="click"):
    """The data behind a figure's button, without the names of the columns."""
    with page.expect_download() as download:
        getattr(page.locator(f"#{name} > .tools .csv"), press)()
    assert download.value.suggested_filename == f"{name}.csv"
    with open(download.value.path(), newline="") as file:
        return list(csv.reader(file))[1:]


def readout(page, name):
    return page.locator(f"#{name} .readout").text_content()


def test_a_page_fits_wide_and_narrow_windows_light_and_dark(run, opened):
    for width, scheme in ((1400, "light"), (390, "dark")):
        page = opened(run / "report.html", width=width, scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert colour_of(page) == {"light": WHITE, "dark": DARK}[scheme]
        check_figures(page, 27, width)
    page.emulate_media(color_scheme="light")
    assert colour_of(page) == WHITE


def test_colours_of_the_text(run, opened):
    page = opened(run / "report.html")
    (farm, town), head = content_of(page)["text"]["texts"], content_of(page)["head"]
    counts = unpacked(farm["counts"])

    def strengths():
        spans = page.locator("#excerpt .piece").first.locator("span")
        return spans.evaluate_all("all => all.map((span) => +span.style.getPropertyValue('--strength'))")

    total = counts.sum(axis=0)
    assert strengths() == pytest.approx((total / total.max())[: len(strengths())].tolist(), abs=1e-3)
    page.get_by_label("Layer", exact=True).first.select_option("1")
    assert strengths() == pytest.approx((counts[1] / counts[1].max())[: len(strengths())].tolist(), abs=1e-3)
    page.get_by_label("Colour").select_option("expert")
    page.get_by_label("Expert", exact=True).first.select_option("3")
    experts, gates = unpacked(farm["expert"]), unpacked(farm["gate"])
    expected, place = [], int(counts[0].sum())
    for count in counts[1].tolist():
        expected.append(sum(gates[place + i] for i in range(count) if experts[place + i] == 3))
        place += count
    assert strengths() == pytest.approx([gate / max(expected) for gate in expected][: len(strengths())], abs=1e-3)
    page.get_by_label("Colour").select_option("loss")
    loss = unpacked(farm["loss"])
    highest = max(value for value in loss.tolist() if value == value)
    assert strengths()[0] == pytest.approx(loss[0] / highest, abs=1e-3)
    page.get_by_label("Colour").select_option("seen")
    assert "occurs" in page.locator("#scale").text_content()
    page.get_by_label("Text", exact=True).select_option("1")
    assert page.locator("#excerpt .piece span").first.text_content() == town["tokens"][0]
    assert head["layers"] == 2


def test_a_token_is_read_by_pointer_keys_and_search(run, opened):
    page = opened(run / "report.html")
    farm, *_ = content_of(page)["text"]["texts"]
    counts, experts = unpacked(farm["counts"]), unpacked(farm["expert"])
    page.locator("#excerpt .piece span").nth(2).hover()
    assert f"token 3 of {len(farm['tokens'])}" in page.locator("#token").text_content()
    shown = page.locator("#token li").first.locator("a").all_text_contents()
    first = int(counts[0, :2].sum())
    assert sorted(map(int, shown)) == experts[first : first + counts[0, 2]].tolist()
    page.locator("#excerpt").focus()
    for key, token in (
        ("ArrowRight", 4),
        ("ArrowLeft", 3),
        ("End", len(farm["tokens"])),
        ("ArrowRight", len(farm["tokens"])),
    ):
        page.keyboard.press(key)
        assert f"token {token} of" in page.locator("#token").text_content()
    assert page.locator("#excerpt .here").is_visible()
    text = "".join(farm["tokens"])
    page.get_by_label("Search").fill("cow")
    assert page.locator("#hits").text_content() == f"1 of {text.count('cow')}"
    page.get_by_role("button", name="Next").click()
    assert page.locator("#hits").text_content() == f"2 of {text.count('cow')}"
    assert "cow" in "".join(page.locator("#excerpt .hit").all_text_contents())
    page.get_by_label("Search").fill("not there")
    assert page.locator("#hits").text_content() == "not found"


def test_a_narrow_page_is_used_by_taps(run, opened):
    page = opened(run / "report.html", width=390, touch=True)
    assert page.evaluate("[document.documentElement.scrollWidth, matchMedia('(hover: none)').matches]") == [390, True]
    farm, *_ = content_of(page)["text"]["texts"]
    counts, experts, gates = (unpacked(farm[name]) for name in ("counts", "expert", "gate"))
    for token in (2, 9, 5):
        page.locator("#excerpt .piece span").nth(token).tap()
        assert f"token {token + 1} of {len(farm['tokens'])}" in page.locator("#token").text_content()
        assert page.locator("#excerpt .here").text_content() == farm["tokens"][token]
        first = int(counts[0, :token].sum())
        of_layer = slice(first, first + counts[0, token])
        pairs = sorted(
            zip(experts[of_layer].tolist(), gates[of_layer].tolist(), strict=True), key=lambda pair: -pair[1]
        )
        shown = page.locator("#token li").first.locator("span").nth(1).text_content()
        found = [(int(expert), float(gate[1:-1])) for expert, gate in map(str.split, shown.split(", "))]
        assert [expert for expert, _ in found] == [expert for expert, _ in pairs]
        assert [gate for _, gate in found] == pytest.approx([gate for _, gate in pairs], rel=1e-2)
    link = page.locator("#token a").first
    place = link.get_attribute("href")
    link.tap()
    _, layer, expert = place.split("-")
    assert page.url.endswith(place)
    card = page.locator(f'#card .name:text-is("Layer {layer}, expert {expert}")')
    card.wait_for()  # the page hears of the new address later
    seen = "document.getElementById('card').getBoundingClientRect().top < innerHeight"
    page.wait_for_function(seen)
    page.locator("#cards").get_by_label("Layer").select_option(str(1 - int(layer)))
    assert page.url.endswith(f"#expert-{1 - int(layer)}-{expert}")
    link.tap()
    card.wait_for()
    page.locator("#excerpt").scroll_into_view_if_needed()
    link.tap()  # once more, though the address stays as it is
    page.wait_for_function(seen)
    page.locator("#expert-load canvas").tap(position={"x": 60, "y": 5})
    assert readout(page, "expert-load").startswith("Layer 0, expert 0: ")
    assert page.locator("#card .name").text_content() == "Layer 0, expert 0"
    page.locator("#card").get_by_role("button", name="Colour the text by it").tap()
    assert "Gate of expert 0 in layer 0" in page.locator("#scale").text_content()
    page.get_by_label("Search").fill("cow")
    page.get_by_role("button", name="Next").tap()
    assert page.locator("#hits").text_content().startswith("2 of ")
    page.get_by_label("steps on a logarithmic scale").tap()
    assert page.get_by_label("steps on a logarithmic scale").is_checked()
    assert rows_of(page, "flow", press="tap")


def test_a_curve_is_read_and_enlarged_by_taps(run, opened):
    page = opened(run / "report.html", width=390, touch=True)
    plot = page.locator("#training-lm_loss")
    lowest, highest = "1", "12"  # the run's steps

    def value_at(place):
        over = plot.locator(".u-over")
        box = over.bounding_box()
        over.tap(position={"x": 2 + place * (box["width"] - 4), "y": box["height"] / 2})
        step, value = plot.locator(".u-value").all_text_contents()
        records = read_metrics(run / "metrics.jsonl")
        assert value == f"{records[int(step) - 1]['lm_loss']:.3g}"
        return step

    assert (value_at(0), value_at(1)) == (lowest, highest)
    plot.get_by_role("button", name="enlarge").tap()  # around the last step
    assert int(value_at(0)) > 5
    assert value_at(1) == highest
    plot.get_by_role("button", name="show the whole range").tap()
    assert value_at(0) == lowest


def test_every_control_is_reached_by_tab_and_framed(run, opened):
    page = opened(run / "report.html")
    controls = page.evaluate(WATCH_FOCUS)
    assert len(controls) > 60
    for _ in controls:
        page.keyboard.press("Tab")
    focused = page.evaluate("window.focused")
    assert [controls[place] for place in range(len(controls)) if place not in {place for place, *_ in focused}] == []
    mark = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--mark')")
    colour = f"rgb({', '.join(mark.replace(',', ' ').split())})"
    for place, *frame in focused:
        assert frame == ["solid", "3px", colour], controls[place]


def test_experts_have_cards_that_one_can_link_to(run, opened):
    page = opened(run / "report.html", place="#expert-1-3")
    content = content_of(page)["experts"]
    assert page.locator("#card .name").text_content() == "Layer 1, expert 3"
    assert "Load over training" in page.locator("#card").text_content()
    bars = page.locator("#card .bar").all_text_contents()
    assert [bar[:4] for bar in bars] == ["farm", "town"]
    assert "nats per token" in page.locator("#card").text_content()
    page.locator("#card").get_by_role("button", name="Colour the text by it").click()
    assert "Gate of expert 3 in layer 1" in page.locator("#scale").text_content()
    page.locator("#expert-load .map").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):  # to layer 0, expert 0 first
        page.keyboard.press(key)
    assert readout(page, "expert-load").startswith("Layer 1, expert 1: ")
    assert page.locator("#card .name").text_content() == "Layer 1, expert 1"
    assert page.url.endswith("#expert-1-1")
    page.locator("#expert-load canvas").click(position={"x": 60, "y": 5})
    assert page.locator("#card .name").text_content() == "Layer 0, expert 0"
    assert page.evaluate(CHARTS) == page.locator(".uplot").count()  # the chart of the card before is destroyed
    rows = rows_of(page, "expert-load")
    assert [[int(row[0]), int(row[1]), float(row[2])] for row in rows] == [
        [layer, expert, content["share"][layer][expert]] for layer in range(2) for expert in range(8)
    ]


def test_curves_are_read_by_keys_and_enlarged(run, opened):
    page = opened(run / "report.html")
    records = read_metrics(run / "metrics.jsonl")
    rows = rows_of(page, "training-lm_loss")
    assert [int(row[0]) for row in rows] == [record["step"] for record in records]
    assert [float(row[1]) for row in rows] == pytest.approx([record["lm_loss"] for record in records])
    page.locator("#training-lm_loss .lines").focus()
    page.keyboard.press("ArrowRight")
    legend = page.locator("#training-lm_loss .u-value").all_text_contents()
    assert legend == ["2", f"{records[1]['lm_loss']:.3g}"]
    box = page.get_by_label("steps on a logarithmic scale")
    box.focus()
    page.keyboard.press("Space")
    assert box.is_checked()
    assert page.locator("#training-lm_loss .uplot").count() == 1
    page.get_by_label("Layers").select_option("1")
    page.locator("#training-load select").select_option("1")
    page.locator("#training-load .map").focus()
    page.keyboard.press("ArrowRight")
    assert readout(page, "training-load").startswith("Layer 1, expert 0, from step 1: ")
    saved = page.evaluate(SAVED)
    assert len(saved) == 27
    for text in saved:
        names, *rows = csv.reader(io.StringIO(text, newline=""))
        assert rows
        assert {len(row) for row in rows} == {len(names)}


def test_the_dial_marks_the_model_as_it_was_trained(run, opened):
    page = opened(run / "report.html")
    dial = content_of(page)["dial"]
    columns = [dial["cap"][name] for name in ("setting", "loss", "active", "speed")]
    assert [[float(cell) for cell in row] for row in rows_of(page, "dial-cap-speed")] == [
        list(row) for row in zip(*columns, strict=True)
    ]
    assert f"{dial['tokens']} tokens" in page.locator("#dial-threshold-loss figcaption").text_content()
    for name, place, key in (("threshold", 0, "Home"), ("cap", -1, "End")):
        page.locator(f"#dial-{name}-loss .lines").focus()
        page.keyboard.press(key)
        setting, measured, trained = page.locator(f"#dial-{name}-loss .u-value").all_text_contents()
        assert float(setting) == dial[name]["setting"][place]
        assert float(measured) == float(trained) == pytest.approx(dial[name]["loss"][place], abs=5e-3)


def test_a_page_is_accessible(run, opened):
    check_accessible(opened(run / "report.html"))


def test_a_page_is_printed_on_white(run, opened):
    check_printed_on_white(opened(run / "report.html", scheme="dark"))


def test_hostile_and_long_texts_do_no_harm(opened, tmp_path):
    T = 20_000
    texts = [*HOSTILE, *["word "] * (T - len(HOSTILE))]
    active_LTE, zero = torch.rand(2, T, 4) < 0.3, torch.zeros(T, dtype=torch.int64)
    gate_LTE, domain = torch.rand(2, T, 4) * active_LTE, "</template><b>\u202e"
    record = RoutingRecord.of(active_LTE, torch.arange(T) % 50, zero, zero, [domain], gate_LTE=gate_LTE, texts=texts)
    path = tmp_path / "hostile.html"
    path.write_text(render(page_data(None, None, record, excerpt_tokens=T)))
    page = opened(path, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    shown = page.locator("#excerpt .piece span")
    assert shown.first.text_content() == HOSTILE[0]
    assert shown.nth(3).text_content() == r"\x00\x1b[31m\x9b"
    assert shown.count() < 2000  # those near the visible part
    page.locator("#excerpt").focus()
    page.keyboard.press("End")
    assert page.locator("#excerpt .here").text_content() == "word "
    assert shown.count() < 4000


def test_words_say_only_what_is_so_for_the_router(opened, tmp_path):
    records = [{"step": step, "lambda": 0.01, "reg_loss": 1.0, "sparsity": 0.5} for step in (1, 2)]
    for steered, controlled in ((True, True), (True, False), (False, False)):
        course = course_of(iter(records), experts=4, k=2, target=0.5 if steered else None)
        head = {"title": "a run", "version": "0", "facts": {}, "outcome": [], "router": "any"}
        (path := tmp_path / "page.html").write_text(
            render({"head": head, "training": course | {"controlled": controlled}})
        )
        words = opened(path).locator("#training figcaption p").all_text_contents()
        assert any("grows" in text for text in words) == controlled
        assert any("is constant" in text for text in words) == (not controlled)
        assert any("gates" in text for text in words) == steered
        assert any("dashed line is the target" in text for text in words) == steered
