"""The report shows what the model does, needs nothing beside itself, and says what it cannot show."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_run import FLAGS
from transformers import AutoTokenizer

from remoe.analysis.collect import collect, gates_of
from remoe.analysis.measures import routed_share
from remoe.cli.main import main
from remoe.report.page import POINTS, _json, _thinned, texts_of
from remoe.training.evaluate_run import open_trained


class Page(HTMLParser):
    """Headings, addresses that a browser would fetch, buttons of experts, and what lies between script tags."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.addresses, self.experts, self.scripts, self._inside = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._inside = tag
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        if "data-expert" in attributes:
            self.experts.append((int(attributes["data-layer"]), int(attributes["data-expert"])))

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside in ("h1", "h2") and data.strip():
            self.headings.append(data)

    def handle_endtag(self, tag):
        self._inside = None


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "A <run> & more"
    flags = ["--steps", "12", "--validate.flips-every", "2", "--granularity", "2", *FLAGS]
    assert main(["train", "--data", str(corpus), "--out", str(out), *flags]) == 0
    assert main(["report", str(out)]) == 0
    return out


def content_of(page):
    return json.loads(page.scripts[0])


def test_text_and_shares_are_the_models(run):
    page = Page((run / "report.html").read_text())
    content, trained = content_of(page), open_trained(str(run), None)
    windows = trained.windows("validation")
    share_LE = routed_share(collect(trained.model, windows, None, 8).active_LTE)
    torch.testing.assert_close(torch.tensor(content["share"]).double(), share_LE, rtol=1e-3, atol=0)
    assert page.experts == [(layer, expert) for layer in range(2) for expert in range(8)]  # E G in each layer
    assert [excerpt["domain"] for excerpt in content["excerpts"]] == ["farm", "town"]
    for excerpt in content["excerpts"]:
        input_BS, _, mask_BS = next(windows.batches(excerpt["domain"], 1))
        assert "".join(excerpt["tokens"]) == trained.tokenizer.decode(input_BS[0])
        gate_LTE = torch.zeros(2, input_BS.shape[1], 8)
        for layer, tokens in enumerate(excerpt["gates"]):
            for token, flat in enumerate(tokens):
                gate_LTE[layer, token, flat[::2]] = torch.tensor(flat[1::2])
        expected = gates_of(trained.model, input_BS, mask_BS)
        assert expected.count_nonzero() > 0
        torch.testing.assert_close(gate_LTE, expected, rtol=1e-2, atol=0)


def test_a_page_needs_no_other_file(run):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|//[a-z]", "".join(page.scripts[1:]) + text[: text.index("</style>")])
    assert page.headings[0] == "Routing of A <run> & more"
    assert {"What the experts do with a text", "Measures", "The course of training", "Flips"} <= set(page.headings)


def test_no_text_ends_the_script():
    words = "</script><script>alert(1)</script><!--"
    assert "<" not in _json({"tokens": [words]})
    assert json.loads(_json({"tokens": [words]})) == {"tokens": [words]}


def test_a_character_of_several_tokens_stands_at_its_last(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    text = "cow 🐄 é!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = texts_of(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "🐄" in texts
    cut = ids[: texts.index("🐄")]  # the text ends within the character
    assert len(texts_of(tokenizer, cut)) == len(cut)


def test_a_model_without_routing_has_its_course_alone(corpus, tmp_path):
    run = tmp_path / "dense"
    assert main(["train", "--data", str(corpus), "--out", str(run), "--steps", "4", "--router", "dense", *FLAGS]) == 0
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "there is no routing to be seen" in text
    assert Page(text).headings[1:] == ["Training loss"]


def test_a_models_folder_has_no_course(run, corpus, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    assert main(["report", str(folder)]) == 2
    assert "names no data; give --data" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--data", str(corpus), "--out", str(page)]) == 0
    exported, trained = Page(page.read_text()), Page((run / "report.html").read_text())
    assert content_of(exported) == content_of(trained)
    assert "The course of training" not in exported.headings


def test_few_records_of_a_long_run_are_drawn():
    records = [{"step": step} for step in range(1, 60_001)]
    steps = [record["step"] for record in _thinned(records)]
    assert steps[:10] == list(range(1, 11))  # a figure with logarithmic steps shows each of them
    assert steps[-1] == 60_000
    assert POINTS < len(steps) <= 2 * POINTS
    assert steps == sorted(set(steps))
    assert _thinned(records[:100]) == records[:100]
