"""The page of a generation: what was written and which experts ran, played step by step."""

import json
import re

import numpy as np
import pytest
import torch
from accessible import check_accessible
from pages import HOSTILE

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.writing import Written
from remoe.lab.cli.main import main
from remoe.lab.report.generation import generation_of
from remoe.lab.report.packed import unpacked
from remoe.lab.report.page import render
from remoe.lab.report.sections import page_data

LAYERS, EXPERTS, PROMPT, T = 2, 4, 3, 400
SAMPLING = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 7,
            "gate_threshold": None, "max_experts": 2, "max_new_tokens": 500}  # fmt: skip


@pytest.fixture(scope="module")
def written():
    generator = torch.Generator().manual_seed(0)
    active_LTE = torch.rand(LAYERS, T - 1, EXPERTS, generator=generator) < 0.4
    gate_LTE = torch.rand(LAYERS, T - 1, EXPERTS, generator=generator) * active_LTE
    nats_T = torch.rand(T, generator=generator) * 4
    nats_T[0] = torch.nan
    texts = [*HOSTILE, *[f" w{i}" for i in range(T - len(HOSTILE))]]
    return Written(
        torch.arange(T) % 50, PROMPT, texts, nats_T, active_LTE, gate_LTE, {"prompt": "p", "sampling": SAMPLING}
    )


@pytest.fixture(scope="module")
def page(written, tmp_path_factory):
    zero = torch.zeros(T - 1, dtype=torch.int64)
    record = RoutingRecord.of(
        written.active_LTE, written.token_T[:-1], zero, zero, ["text"], gate_LTE=written.gate_LTE,
        texts=written.texts[:-1],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("generation") / "page.html"
    path.write_text(render(page_data(None, None, record, excerpt_tokens=50, written=written)))
    return path


def test_numbers_of_a_generation(written):
    found = generation_of(written)
    counts, experts, gates = (unpacked(found[name]) for name in ("counts", "expert", "gate"))
    assert counts.shape == (LAYERS, T - 1)
    pairs = [[(e, g) for e, g in enumerate(row) if g] for layer in written.gate_LTE.tolist() for row in layer]
    assert counts.flatten().tolist() == [len(row) for row in pairs]
    assert experts.tolist() == [e for row in pairs for e, _ in row]
    np.testing.assert_allclose(gates, [g for row in pairs for _, g in row], rtol=4e-3)
    np.testing.assert_array_equal(unpacked(found["loss"]), written.nats_T.numpy())
    assert found["sampling"] == {"temperature": 0.5, "top-k": 0, "top-p": 1.0, "seed": 7, "max-experts": 2}
    assert len(found["tokens"]) == T
    assert len(found["tokens"][5]) == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--generate", "5"], "--generate needs a --prompt"),
        (["--prompt", "a", "--generate", "-1"], "--generate must be from 0 to 10,000, but is -1"),
        (["--prompt", "a", "--generate", "10001"], "--generate must be from 0 to 10,000, but is 10001"),
        (["--prompt", "a", "--generate", "5", "--temperature", "-1"], "--temperature must be 0 or at least"),
        (["--prompt", "a", "--seed", "5"], "the sampling options belong to --generate"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, said):
    assert main(["report", str(tmp_path), *flags]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def place(page):
    return page.locator("#generation-place").text_content()


def map_pixels(page, column, columns):
    """The colours of the middle of a column of the map, from top to bottom."""
    return page.evaluate(
        """([column, columns]) => {
          const canvas = document.querySelector("#generation-steps canvas"), left = 48;
          const x = left + (column + 0.5) * (canvas.width - left - 4) / columns;
          const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
          copy.drawImage(canvas, 0, 0);
          const pixels = copy.getImageData(x, 0, 1, canvas.height - 34).data;
          return [...pixels].filter((_, i) => i % 4 === 0);
        }""",
        [column, columns],
    )


@pytest.mark.slow
def test_a_generation_is_played_paused_and_moved_through(page, opened, written):
    shown = opened(page)
    written_text = shown.locator("#written span")
    assert place(shown) == f"{T - PROMPT} of {T - PROMPT}"
    assert "Not read by the model" in shown.locator("#generation-token").text_content()
    slider = shown.get_by_label("Tokens written")
    slider.fill(str(20))
    assert place(shown) == f"{20 - PROMPT} of {T - PROMPT}"
    assert written_text.all_text_contents()[10:] == written.texts[10:20]
    token = shown.locator("#generation-token").text_content()
    assert f"token 20 of {T}, written" in token
    assert f"{float(written.nats_T[19]):.3g} nats" in token
    expected = [e for e, gate in enumerate(written.gate_LTE[1, 19].tolist()) if gate]
    rows = shown.locator("#generation-token li").nth(1).locator("a").all_text_contents()
    assert sorted(map(int, rows)) == expected
    # of the map, the tokens up to the present one are filled
    assert len(set(map_pixels(shown, 25, 256))) == 1
    shown.locator("#generation-steps").get_by_label("Layer", exact=True).select_option("1")
    colours = map_pixels(shown, 19, 256)
    height = len(colours) // EXPERTS
    blank = map_pixels(shown, 25, 256)[0]
    lowest = 240  # of --map-low, the colour of a pair that was not executed
    assert blank != lowest
    assert [e for e in range(EXPERTS) if colours[e * height + height // 2] != lowest] == expected
    # by keyboard
    shown.locator(".player").focus()
    for key, step in (("ArrowRight", 21), ("ArrowLeft", 20), ("Home", PROMPT), ("ArrowLeft", PROMPT), ("End", T)):
        shown.keyboard.press(key)
        assert place(shown).startswith(f"{step - PROMPT} of")
    shown.get_by_label("Speed").select_option("50")
    shown.keyboard.press("Space")  # from the end, it begins anew
    assert shown.locator("#generation-play").text_content() == "Pause"
    shown.wait_for_function("parseInt(document.getElementById('generation-place').textContent) > 4")
    shown.keyboard.press("Space")
    assert shown.locator("#generation-play").text_content() == "Play"
    at = place(shown)
    assert 4 < int(at.split()[0]) < T - PROMPT
    shown.wait_for_timeout(100)
    assert place(shown) == at
    assert written_text.count() == int(at.split()[0]) + PROMPT


@pytest.mark.slow
def test_a_generation_is_played_and_moved_through_by_taps(page, opened):
    shown = opened(page, width=390, touch=True)
    slider, play = shown.get_by_label("Tokens written"), shown.locator("#generation-play")
    box = slider.bounding_box()
    slider.tap(position={"x": box["width"] / 2, "y": box["height"] / 2})
    at = int(place(shown).split()[0])
    assert 0.3 * T < at < 0.7 * T
    play.tap()
    assert play.text_content() == "Pause"
    shown.wait_for_function(f"parseInt(document.getElementById('generation-place').textContent) > {at}")
    play.tap()
    assert play.text_content() == "Play"
    shown.locator("#generation-steps canvas").tap(position={"x": 60, "y": 5})
    assert shown.locator("#generation-steps .readout").text_content().startswith("Token ")


@pytest.mark.slow
def test_hostile_text_in_a_generation_does_no_harm(page, opened, written):
    shown = opened(page, width=390, scheme="dark")
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    texts = shown.locator("#written span").all_text_contents()
    assert texts[0] == HOSTILE[0]
    assert texts[3] == r"\x00\x1b[31m\x9b"
    assert len(texts[5]) == 200
    for step in range(1, PROMPT + 8):
        shown.get_by_label("Tokens written").fill(str(max(PROMPT, step)))
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    with shown.expect_download() as download:
        shown.locator("#generation-steps > .tools .csv").click()
    assert download.value.path().read_text().count("\n") >= T + 1


@pytest.mark.slow
def test_a_page_with_a_generation_is_accessible(page, opened):
    check_accessible(opened(page))


def test_a_page_with_a_generation_begins_with_it(page):
    text = page.read_text()
    content = json.loads(re.search(r'<script id="content" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert [*content] == ["head", "generation", "text", "experts", "between"]
    assert '<section id="generation">' in text
