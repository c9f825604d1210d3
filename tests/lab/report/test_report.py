"""The report shows what the model does, needs no other file, and says what it cannot show."""

import json
import os
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from tiny_run import FLAGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from remoe.lab.analysis.collect import gates_of
from remoe.lab.analysis.measures import routed_share
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.style import quantity
from remoe.lab.analysis.texts import PreparedText, TokenTexts
from remoe.lab.cli.main import main
from remoe.lab.evaluation.trained import open_trained
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.report.contents import POINTS, excerpts, outcome, thinned
from remoe.lab.report.page import percent, script_json
from remoe.lab.training.folder import newest_run
from remoe.lab.training.load import load_run


class Page(HTMLParser):
    """Title, ids of the sections, addresses that a browser would fetch, labels of the experts' buttons, and scripts."""

    def __init__(self, text):
        super().__init__()
        self.title, self.sections, self.addresses, self.experts, self.scripts = "", [], [], [], []
        self._inside = self._expert = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._inside = tag
        self.sections += [attributes["id"]] if tag == "section" else []
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        is_expert = "data-expert" in attributes
        self._expert = (int(attributes["data-layer"]), int(attributes["data-expert"])) if is_expert else None

    def handle_data(self, data):
        if self._expert:
            self.experts.append((*self._expert, data))
        elif self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "h1":
            self.title += data

    def handle_endtag(self, tag):
        self._inside = self._expert = None


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
    share_LE = routed_share(record_routing(Mixture(trained.model), PreparedText(windows, None)).whole().active_LTE)
    shown = [percent(share) if share >= 2 / 8 / 8 else "×" for share in share_LE.flatten().tolist()]  # k G over 8 E G
    places = [(layer, expert) for layer in range(2) for expert in range(8)]
    assert page.experts == [(*place, share) for place, share in zip(places, shown, strict=True)]
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
    assert page.title.endswith("A <run> & more")
    assert {"text", "map", "measures", "picture-course", "picture-flips"} <= set(page.sections)


def test_the_page_begins_with_how_the_run_went(run):
    text, summary = (run / "report.html").read_text(), json.loads((run / "summary.json").read_text())
    header = text[text.index("<header>") : text.index("</header>")]
    assert [unescape(sentence) for sentence in re.findall(r"<li>(.*?)</li>", header)] == summary["outcome"]
    assert summary["outcome"][0].startswith("Sparsity has not settled")
    crossed = [sum(mark == "×" for at, _, mark in Page(text).experts if at == layer) for layer in range(2)]
    assert crossed == summary["inactive_experts_per_layer"]


@pytest.mark.parametrize("said", [None, "words", [1, {}], {}])
def test_a_summary_of_0_1_0_and_a_damaged_one_have_no_words_on_how_it_went(said):
    summary = {"steps": 6} | ({} if said is None else {"outcome": said})
    run = SimpleNamespace(load_summary=lambda: summary)
    assert outcome(run, 6) == []
    summary["outcome"] = ["All is well."]
    assert outcome(run, 6) == ["All is well."]
    assert outcome(run, 3) == outcome(None, None) == []


def test_no_text_ends_the_script():
    words = "</script><script>alert(1)</script><!--"
    assert "<" not in script_json({"tokens": [words]})
    assert json.loads(script_json({"tokens": [words]})) == {"tokens": [words]}


def test_a_character_of_several_tokens_stands_at_its_last(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    text = "cow 🐄 é!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = TokenTexts(tokenizer)(ids)
    assert "".join(texts) == text
    last = texts.index("🐄")
    assert texts[last - 3 : last] == ["", "", ""]
    assert TokenTexts(tokenizer)(ids[:last])[-1] == "\ufffd"  # the text ends within the character


@pytest.mark.parametrize("kind", ["WordPiece", "Metaspace"])
def test_texts_of_tokenizers_that_drop_what_begins_a_text(kind):
    words = ["[UNK]", "the", "▁the", "cow", "▁cow", "▁", "##s", "s", ".", "▁."]
    if kind == "WordPiece":
        core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        text, pieces = "the cows the cow.", ["the", " cow", "s", " the", " cow", "."]
    else:
        core = Tokenizer(models.Unigram([(word, -len(word) / 100) for word in words], unk_id=0))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        text, pieces = "the cows the cow.", ["the", " cow", "s", " the", " cow", "."]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", clean_up_tokenization_spaces=False)
    assert TokenTexts(tokenizer)(tokenizer(text)["input_ids"]) == pieces


def test_generated_text_goes_on_where_the_prompt_ends(run, monkeypatch):
    core = Tokenizer(models.Unigram([(word, -1.0) for word in ("[UNK]", "▁the", "▁cow", "s", "</s>")], unk_id=0))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")
    model, _, _ = load_run(run)
    asked = []

    def generate(ids, **options):
        asked.append(ids[0].tolist())
        return torch.cat((ids, torch.tensor([[2, 3]])), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert generate_text(model, tokenizer, "the", SamplingOptions(max_new_tokens=2)) == " cows"
    assert asked == [[1]]  # without what the tokenizer puts behind a text: our training data has none


def test_executed_pairs_are_shown_whatever_their_gate():
    """A softmax may round a gate to zero, and a learned scale may flip its sign."""
    gates = torch.tensor([0.0, -0.25, float("nan"), 0.12345])
    active_LTE = torch.tensor([[[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]]]).bool()
    zero = torch.zeros(4, dtype=torch.int64)
    gate_LTE = gates[None, :, None].expand(1, 4, 3)
    record = RoutingRecord.of(active_LTE, torch.arange(4), zero, zero, ["farm"], gate_LTE=gate_LTE)
    (farm,) = excerpts(record, 3)
    assert farm.gates == [[[0, 0.0, 1, 0.0], [1, -0.25], [0, None, 2, None]]]
    assert farm.tokens == ["[0] ", "[1] ", "[2] "]


def test_a_model_without_routing_has_its_course_alone(corpus, tmp_path):
    run = tmp_path / "dense"
    assert main(["train", "--data", str(corpus), "--out", str(run), "--steps", "4", "--router", "dense", *FLAGS]) == 0
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "target" not in text[: text.index("<script")]
    assert Page(text).sections == ["unrouted", "picture-loss"]


def test_a_models_folder_has_no_course(run, corpus, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    assert main(["report", str(folder)]) == 2
    assert "--data" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--data", str(corpus), "--out", str(page)]) == 0
    exported, trained = Page(page.read_text()), Page((run / "report.html").read_text())
    assert content_of(exported) == content_of(trained)
    assert not {"picture-course", "picture-loss"} & set(exported.sections)


def test_a_given_checkpoint_has_a_page_of_its_own(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--steps", "6", "--checkpoint.every", "3", "--model.shared-expert-size", "16", *FLAGS]
    assert main(["train", "--data", str(corpus), "--out", str(run), *flags]) == 0
    capsys.readouterr()
    early = run / "checkpoints" / "step-00000003"
    assert main(["report", str(early), "--excerpt", "5"]) == 0
    assert "report-step-3.html" in capsys.readouterr().out
    text = (run / "report-step-3.html").read_text()
    assert "3 steps of 128 tokens" in text
    assert "validation loss" not in text
    assert "the shared expert alone" in text
    assert [len(excerpt["tokens"]) for excerpt in content_of(Page(text))["excerpts"]] == [5, 5]
    assert not (run / "report.html").exists()
    early.rename(run / "checkpoints" / "best")
    (run / "summary.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run / "checkpoints" / "best"), "--excerpt", "5"]) == 0
    assert "picture-loss" not in Page((run / "report-step-3.html").read_text()).sections
    (run / "checkpoints" / "best" / "training.json").unlink()
    capsys.readouterr()
    assert main(["report", str(run / "checkpoints" / "best")]) == 2
    assert "training.json cannot be read (No such file" in capsys.readouterr().err


def test_a_report_does_not_make_an_old_run_the_newest(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("newer", "older")):
        copy = tmp_path / "runs" / name
        shutil.copytree(run, copy)
        for path in (copy, *copy.rglob("*")):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_run().name == "newer"
    assert main(["report", "runs/older", "--excerpt", "2", "--max-tokens", "50"]) == 0
    assert newest_run().name == "newer"


def test_numbers_have_two_or_three_digits():
    assert [percent(share) for share in (0.00391, 0.0351, 0.1249, 1.0)] == ["0.39", "3.5", "12", "100"]
    assert [quantity(number) for number in (7, 50_000, 999_600, 16_129_728)] == ["7", "50000", "1M", "16.1M"]


def test_few_records_of_a_long_run_are_drawn():
    records = [{"step": step} for step in range(1, 60_001)]
    steps = [record["step"] for record in thinned(records)]
    assert steps[:10] == list(range(1, 11))  # a figure with logarithmic steps shows each of them
    assert steps[-1] == 60_000
    assert POINTS < len(steps) <= 2 * POINTS
    assert steps == sorted(set(steps))
    assert thinned(records[:100]) == records[:100]
