"""The page of a comparison in a browser: differences are coloured, both models are read, every plot has its data."""

import csv
import io

import pytest
import torch
from accessible import check_accessible
from pages import HOSTILE, SAVED, check_figures, check_printed_on_white

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.report.several.models import Compared
from remoe.lab.report.several.page import comparison_data, render
from remoe.lab.report.several.training import training_from

pytestmark = pytest.mark.slow
T = 600


def training(steps, controlled):
    records = (
        {"step": step, "lm_loss": 9 - step / steps, "sparsity": 0.5, "lambda": 0.01 * step, "reg_loss": 2.0,
         "grad_norm": 1.0, "tokens_per_second": 1e3, "flip_rate": 0.1, "load_per_expert": [[0.3, 0.2]]}
        for step in range(1, steps + 1)
    )  # fmt: skip
    return training_from(records, 2, 1, 0.5 if controlled else None, 64 * steps)


@pytest.fixture(scope="module")
def made():
    """Masks and losses of three models, of which the second and third have one layer more."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(layers, T, 4, generator=generator) < 0.4 for layers in (2, 3, 3)]
    return masks, [torch.rand(T, generator=generator) * 3 for _ in masks]


@pytest.fixture(scope="module")
def path(made, tmp_path_factory):
    masks, losses = made
    token_T, domain_T, sequence_T = torch.arange(T) % 20, torch.arange(T) * 2 // T, torch.arange(T) // 50
    texts = [f"w{token} " for token in token_T.tolist()]
    compared = []
    for name, mask, loss_T in zip(("one", "two", "three"), masks, losses, strict=True):
        record = RoutingRecord.of(
            mask, token_T, domain_T, sequence_T, ["farm", "town"], gate_LTE=mask * 0.5, loss_T=loss_T, texts=texts
        )
        trained = None if name == "three" else training(8 if name == "one" else 6, name == "one")
        compared.append(Compared(name, "relu", record, facts={"router": name}, outcome=["Settled."], training=trained))
    return write_page(tmp_path_factory.mktemp("several") / "page.html", compared)


def write_page(path, compared):
    path.write_text(render(comparison_data(compared, 250)))
    return path


def test_a_comparison_fits_wide_and_narrow_windows(path, opened):
    for width, scheme in ((1400, "light"), (390, "dark")):
        page = opened(path, width=width, scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        check_figures(page, 21, width)
    saved = page.evaluate(SAVED)
    assert len(saved) == 21
    for text in saved:
        names, *rows = csv.reader(io.StringIO(text, newline=""))
        assert rows
        assert {len(row) for row in rows} == {len(names)}


def test_differences_are_coloured_and_read(path, opened, made):
    (one, two, three), losses = made
    page = opened(path)

    def colours():
        found = (
            page.locator("#excerpt .piece")
            .first.locator("span")
            .evaluate_all(
                "all => all.map((one) => [+one.style.getPropertyValue('--strength'), one.classList.contains('more')])"
            )
        )
        return [strength * (1 if more else -1) for strength, more in found]

    def expected(difference_T):
        sizes = sorted(abs(value) for value in difference_T.tolist() if value)
        highest = sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))]
        return pytest.approx((difference_T / highest).clamp(-1, 1).tolist()[: len(colours())], abs=1e-3)

    counts = [mask[:, :250].sum(dim=2).double() for mask in (one, two, three)]
    assert len(colours()) >= 60
    assert colours() == expected(counts[1].mean(dim=0) - counts[0].mean(dim=0))
    page.locator("#text-tokens").get_by_label("Layer").select_option("1")
    page.get_by_label("Model", exact=True).select_option("2")
    assert colours() == expected(counts[2][1] - counts[0][1])
    page.get_by_label("Colour").select_option("loss")
    difference_T = (losses[2] - losses[0])[:249].double()
    assert colours()[0] == 0  # nothing is before the first token
    assert colours() == expected(torch.cat([torch.zeros(1), difference_T]))
    assert "three predicts it worse" in page.locator("#scale").text_content()

    page.locator("#excerpt .piece span").nth(5).hover()
    cells = page.locator("#token tbody tr").evaluate_all(
        "all => all.map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert cells[1][1] == f"{losses[0][4]:.3g}"
    for layer in range(3):
        for mask, cell in zip((one, two, three), cells[2 + layer][1:], strict=True):
            experts = mask[layer, 5].nonzero().flatten().tolist() if layer < len(mask) else None
            shown = "–" if experts is None else ", ".join(f"{expert} (0.5)" for expert in experts) or "none"
            assert cell == shown
    page.locator("#excerpt").focus()
    for key, token in (("ArrowRight", 7), ("End", 250), ("ArrowRight", 250), ("Home", 1)):
        page.keyboard.press(key)
        assert f"token {token} of 250" in page.locator("#token").text_content()
    page.get_by_label("Search").fill("w19 ")
    assert page.locator("#hits").text_content() == "1 of 12"
    assert "w19" in page.locator("#excerpt .hit").text_content()
    page.locator("#text-tokens").get_by_label("Text", exact=True).select_option("1")
    assert "token" in page.locator("#token").text_content()


def test_curves_of_models_are_read_together(path, opened):
    page = opened(path)
    plot = page.locator("#training-lm_loss")
    plot.locator(".lines").focus()
    page.keyboard.press("ArrowRight")
    assert plot.locator(".u-value").all_text_contents() == ["2", "8.75", "8.67"]
    page.get_by_label("Over").select_option("tokens")
    plot.locator(".u-label", has_text="tokens").wait_for()  # drawn again when it is seen
    page.locator("#load .map").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#load .readout").nth(1).text_content().startswith("Layer 0, expert 0: ")
    assert page.locator("#load .readout").nth(0).text_content().startswith("Point")
    page.locator("#domains").get_by_label("Layer").select_option("0")
    row = page.locator("#measures tbody tr").filter(has_text="experts per layer").locator("td").all_text_contents()
    assert row == ["4", "4", "±0", "4", "±0"]


def test_a_comparison_is_accessible_and_printed_on_white(path, opened):
    check_accessible(opened(path))
    check_printed_on_white(opened(path, scheme="dark"))


def test_hostile_texts_in_a_comparison_do_no_harm(opened, tmp_path):
    token_T, zero_T = torch.arange(T) % 20, torch.zeros(T, dtype=torch.int64)
    texts = [*HOSTILE, *["word "] * (T - len(HOSTILE))]
    name = "</template><b>\u202e"
    compared = [
        Compared(
            name, "relu", RoutingRecord.of(mask, token_T, zero_T, zero_T, [name], gate_LTE=mask * 0.5, texts=texts)
        )
        for mask in (torch.rand(2, 2, T, 4) < 0.4)
    ]
    page = opened(write_page(tmp_path / "hostile.html", compared), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    shown = page.locator("#excerpt .piece span")
    assert shown.first.text_content() == HOSTILE[0]
    assert shown.nth(3).text_content() == r"\x00\x1b[31m\x9b"
