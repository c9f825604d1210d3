"""The report shows what the model does, needs no other file, and says what it cannot show."""

import base64
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
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
from remoe.lab.report.contents import outcome
from remoe.lab.report.course import COLUMNS, course_of
from remoe.lab.report.packed import short, unpacked, whole_numbers
from remoe.lab.report.page import SCRIPTS, render, script_json
from remoe.lab.report.reading import text_of
from remoe.lab.report.sections import page_data
from remoe.lab.thinning import POINTS, kept_points
from remoe.lab.training.folder import newest_run
from remoe.lab.training.load import load_run
from remoe.lab.training.metrics import read_metrics


class Page(HTMLParser):
    """Title, ids of the sections, addresses that a browser would fetch, and scripts."""

    def __init__(self, text):
        super().__init__()
        self.title, self.sections, self.addresses, self.scripts = "", [], [], []
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._inside = tag
        self.sections += [attributes["id"]] if tag == "section" else []
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "h1":
            self.title += data

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


def gates_of_text(text, layers, experts):
    """(L, T, E) of a page's text."""
    count_LT, gate_LTE = unpacked(text["counts"]), torch.zeros(layers, len(text["tokens"]), experts)
    pairs = zip(unpacked(text["expert"]).tolist(), unpacked(text["gate"]).tolist(), strict=True)
    for layer in range(layers):
        for token, count in enumerate(count_LT[layer].tolist()):
            for expert, gate in itertools.islice(pairs, count):
                gate_LTE[layer, token, expert] = gate
    return gate_LTE


def test_text_and_shares_are_the_models(run):
    content, trained = content_of(Page((run / "report.html").read_text())), open_trained(str(run), None)
    windows = trained.windows("validation")
    record = record_routing(Mixture(trained.model), PreparedText(windows, None))
    block = record.whole()
    experts = content["experts"]
    torch.testing.assert_close(
        torch.tensor(experts["share"]), routed_share(block.active_LTE).float(), rtol=1e-3, atol=0
    )
    assert experts["inactiveBelow"] == 2 / 8 / 8  # k G over 8 E G
    assert [text["domain"] for text in content["text"]["texts"]] == experts["domains"] == ["farm", "town"]
    for number, text in enumerate(content["text"]["texts"]):
        input_BS, _, mask_BS = next(windows.batches(text["domain"], 1))
        first, S = slice(0, input_BS.shape[1]), input_BS.shape[1]
        assert len(text["tokens"]) > S
        assert "".join(text["tokens"][first]) == trained.tokenizer.decode(input_BS[0])
        expected = gates_of(trained.model, input_BS, mask_BS)
        assert expected.count_nonzero() > 0
        torch.testing.assert_close(gates_of_text(text, 2, 8)[:, first], expected, rtol=1e-2, atol=0)
        of_domain = block.domain_T == number
        torch.testing.assert_close(
            torch.tensor(unpacked(text["loss"])), block.loss_T[of_domain], rtol=1e-4, atol=1e-5, equal_nan=True
        )
        counts = Counter(block.token_T.tolist())
        assert unpacked(text["seen"]).tolist() == [counts[token] for token in block.token_T[of_domain].tolist()]


def test_a_page_needs_no_other_file(run):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.addresses == ["#text", "#experts", "#between", "#training"]
    assert len(page.scripts) == 2 + len(SCRIPTS)
    assert not re.search(r"url\(|@import|//[a-z]", "".join(page.scripts[2:]) + text[: text.index("</style>")])
    assert page.title.endswith("A <run> & more")
    assert page.sections == ["text", "experts", "between", "training"]
    assert {"sparsity", "lambda", "flip_rate", "sparsity_per_layer"} <= content_of(page)["training"]["plots"].keys()


def test_the_page_begins_with_how_the_run_went(run):
    text, summary = (run / "report.html").read_text(), json.loads((run / "summary.json").read_text())
    header = text[text.index("<header>") : text.index("</header>")]
    assert [unescape(sentence) for sentence in re.findall(r"<li>(.*?)</li>", header)] == summary["outcome"]
    assert summary["outcome"][0].startswith("Sparsity has not settled")
    experts = content_of(Page(text))["experts"]
    crossed = [sum(share < experts["inactiveBelow"] for share in layer) for layer in experts["share"]]
    assert crossed == summary["inactive_experts_per_layer"]


def test_the_course_is_that_of_the_records(run):
    course = content_of(Page((run / "report.html").read_text()))["training"]
    records = read_metrics(run / "metrics.jsonl")
    for name in ("lm_loss", "lambda", "sparsity", "reg_loss", "tokens_per_second", "flip_rate"):
        known = [record for record in records if name in record]
        plot = course["plots"][name]
        assert unpacked(plot["step"]).tolist() == [record["step"] for record in known]
        assert unpacked(plot["values"])[0].tolist() == pytest.approx([record[name] for record in known])
    memory = unpacked(course["plots"]["memory"]["values"])[0]
    assert memory.tolist() == pytest.approx([record["memory_bytes"] / 2**30 for record in records])
    assert 0.05 < memory.min() < 100  # of a Python process with torch, in GiB
    per_layer = unpacked(course["plots"]["sparsity_per_layer"]["values"]).T
    assert per_layer.tolist() == pytest.approx(np.array([record["sparsity_per_layer"] for record in records]))
    load_SLE = np.array([record["load_per_expert"] for record in records])
    np.testing.assert_allclose(unpacked(course["load"]["share"]).transpose(2, 0, 1), load_SLE, rtol=4e-3)
    few = (load_SLE < 2 / 8 / 8).sum(axis=(1, 2))
    assert unpacked(course["plots"]["inactive"]["values"])[0].tolist() == few.tolist()
    assert course["target"] == 1 - 2 / 8
    assert [record["stage"] for record in records] == [
        name for first, last, name in course["stages"] for _ in range(first, last + 1)
    ]


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
    (farm,) = text_of(record, 3)["texts"]
    assert farm["tokens"] == ["[0] ", "[1] ", "[2] "]
    assert unpacked(farm["counts"]).tolist() == [[2, 1, 2]]
    assert unpacked(farm["expert"]).tolist() == [0, 1, 1, 0, 2]
    np.testing.assert_array_equal(unpacked(farm["gate"]), [0.0, 0.0, -0.25, math.nan, math.nan])


def test_pairs_of_several_blocks_are_ordered_by_layer(monkeypatch):
    monkeypatch.setattr("remoe.lab.report.reading.ROWS", 3)
    active_LTE = torch.rand(2, 12, 5) < 0.5
    sequence_T = torch.arange(12) // 3
    gate_LTE = torch.randn(2, 12, 5).bfloat16().float() * active_LTE
    domain_T, token_T = torch.zeros(12, dtype=torch.int64), torch.arange(12)
    record = RoutingRecord.of(active_LTE, token_T, domain_T, sequence_T, ["farm"], gate_LTE=gate_LTE)
    (farm,) = text_of(record, 10)["texts"]
    assert not farm["cut"]
    torch.testing.assert_close(gates_of_text(farm, 2, 5), gate_LTE[:, :10], rtol=0, atol=0)
    monkeypatch.setattr("remoe.lab.report.reading.MAX_PAIRS", int(active_LTE[:, :5].sum()))
    (farm,) = text_of(record, 10)["texts"]
    assert farm["cut"]
    torch.testing.assert_close(gates_of_text(farm, 2, 5), gate_LTE[:, :5], rtol=0, atol=0)


def test_numbers_of_two_bytes_are_rounded_as_torch_rounds():
    values = torch.cat([torch.randn(500), torch.tensor([0.0, -0.0, 1e-30, 3e38, math.nan, math.inf, -math.inf])])
    found = torch.tensor(unpacked(short(values.numpy())))
    torch.testing.assert_close(found, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    assert unpacked(short(np.zeros((0, 3)))).shape == (0, 3)


@pytest.mark.parametrize("highest", [0, 1, 5, 127, 255, 300, 4095, 70_000, 2**24 - 1, 2**24, 2**32 - 1])
def test_whole_numbers_have_as_few_bits_as_they_need(highest):
    values = torch.randint(highest + 1, (3, 11), generator=torch.Generator().manual_seed(0)).numpy()
    values[1, 4] = highest
    packed = whole_numbers(values)
    assert unpacked(packed).tolist() == values.tolist()
    width = max(1, highest.bit_length()) if highest < 2**24 else 32
    assert len(base64.b64decode(packed["data"])) == math.ceil(33 * width / 8)
    assert unpacked(whole_numbers(np.zeros((0,)))).tolist() == []


def test_a_model_without_routing_has_its_course_alone(corpus, tmp_path):
    run = tmp_path / "dense"
    assert main(["train", "--data", str(corpus), "--out", str(run), "--steps", "4", "--router", "dense", *FLAGS]) == 0
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "target" not in text[: text.index("<script")]
    assert Page(text).sections == ["unrouted", "training"]
    assert content_of(Page(text)).keys() == {"head", "training"}


def test_a_models_folder_has_no_course(run, corpus, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    assert main(["report", str(folder)]) == 2
    assert "--data" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--data", str(corpus), "--out", str(page)]) == 0
    exported, trained = Page(page.read_text()), Page((run / "report.html").read_text())
    expected = content_of(trained)
    assert expected.pop("training")["plots"]
    assert content_of(exported) | {"head": None} == expected | {"head": None}


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
    assert [len(one["tokens"]) for one in content_of(Page(text))["text"]["texts"]] == [5, 5]
    assert not (run / "report.html").exists()
    early.rename(run / "checkpoints" / "best")
    (run / "summary.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run / "checkpoints" / "best"), "--excerpt", "5"]) == 0
    assert "training" not in Page((run / "report-step-3.html").read_text()).sections
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


def test_numbers_have_few_digits():
    assert [quantity(number) for number in (7, 50_000, 999_600, 16_129_728)] == ["7", "50000", "1M", "16.1M"]


def test_a_long_course_keeps_its_spikes_and_first_steps():
    def record(step):
        return {"step": step, "lm_loss": 9.0 if step == 41_234 else 2.0, "sparsity": 0.0 if step == 7_777 else 0.5,
                "stage": "dense" if step < 100 else "sparse", "load_per_expert": [[step / 60_000, 0.0]]}  # fmt: skip

    course = course_of(map(record, range(1, 60_001)), experts=2, k=1, target=0.5)
    loss, sparsity = course["plots"]["lm_loss"], course["plots"]["sparsity"]
    steps, values = unpacked(loss["step"]), unpacked(loss["values"])[0]
    assert steps[:10].tolist() == list(range(1, 11))  # logarithmic steps show each of them
    assert steps[-1] == 60_000
    assert 600 < len(steps) <= POINTS
    assert steps[values == 9].tolist() == [41_234]
    assert unpacked(sparsity["step"])[unpacked(sparsity["values"])[0] == 0].tolist() == [7_777]
    assert course["stages"] == [[1, 99, "dense"], [100, 60_000, "sparse"]]
    load_LEN, first = unpacked(course["load"]["share"]), unpacked(course["load"]["step"])
    assert COLUMNS / 2 <= len(first) <= COLUMNS
    width = first[1] - first[0]
    np.testing.assert_allclose(load_LEN[0, 0, :-1], (first[:-1] + (width - 1) / 2) / 60_000, rtol=4e-3)
    assert course_of(iter(()), experts=2, k=1, target=0.5) is None


def test_every_curve_keeps_its_own_spike():
    values = np.full((3, 10_000), 0.5)
    values[[0, 1, 2], [4_000, 4_001, 4_002]] = [9, -9, 9]
    assert {4_000, 4_001, 4_002, 0, 9_999} <= set(kept_points(values, 600).tolist())


@pytest.mark.parametrize(
    ("shared", "expected"),
    [(True, "by the shared expert alone"), (False, "skips the layer"), (None, "by no routed expert")],
)
def test_words_on_tokens_without_experts_say_what_is_known(shared, expected):
    token_T, zero = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    for active_LTE, said in (
        (torch.arange(12).view(1, 4, 3) % 5 == 0, expected),
        (torch.eye(3)[[0, 1, 2, 0]][None].bool(), "Every token shown has 1 expert in each layer"),
    ):
        record = RoutingRecord.of(active_LTE, token_T, zero, zero, ["farm"])
        record.about = dataclasses.replace(record.about, shared_expert=shared)
        text = " ".join(render(page_data(None, None, record, excerpt_tokens=4)).split())
        assert said in text
        assert ("skips the layer" in text) == (said == "skips the layer")
