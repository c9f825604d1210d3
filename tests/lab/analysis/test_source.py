"""`remoe record` and `remoe report` take any mixture, and prepared data, raw text or a prompt."""

import json
import re

import pytest
import torch
import transformers
from packaging import version
from tiny_models import MIXTURES, SINCE_5_23, build

from remoe.lab.analysis import between
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.texts import RawText
from remoe.lab.cli.main import main
from remoe.lab.data import Document, load_tokenizer, open_dataset

WORDS = "cow 🐄 hen. road"
OLD = version.parse(transformers.__version__) < version.parse("5.23")
TYPES = [
    pytest.param(
        name, marks=[pytest.mark.slow, pytest.mark.skipif(OLD and name in SINCE_5_23, reason="transformers 5.23")]
    )
    for name in MIXTURES
    if name != "mixtral"  # which the fast tests use
]


@pytest.fixture(scope="module")
def mixtral(corpus, tmp_path_factory):
    """A folder of transformers' Mixtral with the tokenizer of the corpus."""
    folder = tmp_path_factory.mktemp("mixtral")
    build("mixtral", vocab_size=open_dataset(corpus).vocab_size).save_pretrained(folder)
    load_tokenizer(corpus / "tokenizer").save_pretrained(folder)
    return folder


def recorded(model, out, *flags):
    assert main(["record", str(model), "--out", str(out), *map(str, flags)]) == 0
    return RoutingRecord(out)


def test_a_prompt_is_recorded_token_by_token(mixtral, tmp_path):
    record = recorded(mixtral, tmp_path / "r.parquet", "--prompt", WORDS)
    block, tokenizer = record.whole(texts=True), load_tokenizer(mixtral)
    assert block.token_T.tolist() == tokenizer(WORDS)["input_ids"]
    assert "".join(block.texts) == WORDS
    assert record.about.domains == ["prompt"]
    assert block.loss_T.isnan().tolist() == [False] * (len(block.token_T) - 1) + [True]
    assert record.about.model["class"] == "MixtralForCausalLM"
    assert len(record.about.model["weights_sha256"]) == 64
    mixture = Mixture(build("mixtral", vocab_size=open_dataset_size(mixtral)))
    with torch.no_grad():
        _, layers = mixture.run(block.token_T[None])
    assert torch.equal(block.active_LTE[1], layers[1].active_TE)


def open_dataset_size(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_raw_text_is_recorded_like_the_same_text_prepared(mixtral, corpus, tmp_path):
    text = corpus.parent / "text" / "farm"
    record = recorded(mixtral, tmp_path / "raw.parquet", "--data", text, "--max-tokens", "300")
    tokenizer = load_tokenizer(mixtral)
    files = sorted(text.iterdir())
    ids = [[*tokenizer(file.read_text())["input_ids"], tokenizer.eos_token_id] for file in files]
    assert record.whole().token_T.tolist() == [token for one in ids for token in one][:300]
    assert record.about.domains == ["farm"]
    assert set(record.whole().sequence_T.bincount().tolist()) == {64, 300 % 64}
    prepared = recorded(mixtral, tmp_path / "data.parquet", "--data", corpus, "--max-tokens", "100")
    assert prepared.about.domains == ["farm", "town"]
    assert prepared.about.text["fingerprint"] == open_dataset(corpus).fingerprint


def test_raw_text_of_several_domains_is_joined_by_domain(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    documents = [Document("cow sheep", "a"), Document("bus tram lamp", "b"), Document("hen", "a")]
    text = RawText(lambda: documents, tokenizer, 4, None, "here")
    rows = {}
    for batch in text.batches(2):
        assert batch.input_NS.shape[0] <= 2
        assert torch.equal(batch.mask_NS, batch.target_NS != -100)
        rows.setdefault(batch.domain, []).append((batch.input_NS[batch.mask_NS], batch.target_NS[batch.mask_NS]))
    eos = tokenizer.eos_token_id
    for domain, texts in {"a": ["cow sheep", "hen"], "b": ["bus tram lamp"]}.items():
        ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], eos)]
        inputs, targets = (torch.cat(part).tolist() for part in zip(*rows[domain], strict=True))
        assert inputs == ids[:-1]
        assert targets == ids[1:]


def test_the_report_of_an_unconverted_mixture(mixtral, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", str(mixtral), "--prompt", WORDS, "--out", str(page), "--effect-tokens", "50"]) == 0
    text = page.read_text()
    content = json.loads(re.search(r'<script id="content" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    record = recorded(mixtral, tmp_path / "r.parquet", "--prompt", WORDS)
    content = content["experts"] | {"text": content["text"]}
    assert content["effect"]["tokens"] == record.about.tokens - 1
    effects = [[content["effect"]["all"][layer][expert] for expert in range(4)] for layer in range(2)]
    used_LE = record.whole().active_LTE.any(dim=1)
    assert torch.equal(torch.tensor(effects) != 0, used_LE)
    assert content["effect"]["byDomain"] == [effects]
    follow = between.nearest(between.flow(record, 1), 3)
    assert [[near[0] for near in experts] for experts in content["next"][0]] == [[n.expert for n in e] for e in follow]
    near = between.nearest(between.coactivation(record, 1), 3, others=True)
    assert [[one[0] for one in experts] for experts in content["near"][1]] == [[n.expert for n in e] for e in near]
    (first, *_) = between.strongest_contexts(record, 1, 3)[int(used_LE[1].nonzero()[0])]
    (shown, *_) = content["contexts"][1][int(used_LE[1].nonzero()[0])]
    assert shown[:3] == [first.before, first.token, first.after]
    assert "MixtralForCausalLM" in text
    assert "2 layers of 4; target: 2 per token" in text
    assert "The router decides how many" not in text  # TopK does not


@pytest.mark.parametrize("name", TYPES)
def test_the_report_of_every_mixture_that_relufy_knows(name, corpus, tmp_path):
    model, page = tmp_path / name, tmp_path / "page.html"
    build(name, vocab_size=open_dataset(corpus).vocab_size).save_pretrained(model)
    load_tokenizer(corpus / "tokenizer").save_pretrained(model)
    flags = ["--prompt", WORDS, "--generate", "2", "--effect-tokens", "9"]
    assert main(["report", str(model), "--out", str(page), *flags]) == 0
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert [*content] == ["head", "generation", "text", "experts", "between"]
    assert (content["head"]["experts"], content["head"]["k"]) == (4, 2)
    assert content["text"]["same"] == 2  # experts of a token, in every layer
    assert torch.tensor(content["experts"]["share"]).sum(dim=1).tolist() == pytest.approx(
        [2] * content["head"]["layers"], abs=1e-3
    )
    assert any(effect for layer in content["experts"]["effect"]["all"] for effect in layer)


def test_the_report_of_a_generation(mixtral, tmp_path):
    page = tmp_path / "page.html"
    flags = ["--prompt", WORDS, "--generate", "6", "--temperature", "5", "--top-k", "0", "--effect-tokens", "50"]
    assert main(["report", str(mixtral), "--out", str(page), *flags]) == 0
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    generation, (shown,) = content["generation"], content["text"]["texts"]
    assert "".join(generation["tokens"]).startswith(WORDS)
    assert generation["prompt"] == len(load_tokenizer(mixtral)(WORDS)["input_ids"])
    assert len(generation["tokens"]) == generation["prompt"] + 6
    assert generation["sampling"] == {"temperature": 5.0, "top-k": 0, "top-p": 1.0, "seed": 0}
    assert shown["tokens"] == generation["tokens"][:-1]
    assert shown["domain"] == "prompt and text"
    assert [shown[name] for name in ("expert", "gate")] == [generation[name] for name in ("expert", "gate")]
    assert content["experts"]["effect"]["tokens"] == len(shown["tokens"]) - 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--data"),
        (["--prompt", ""], "the prompt has no tokens"),
        (["--prompt", "a\udcff"], "not valid UTF-8"),
        (["--data", "missing"], "no such dataset folder"),
        (["--prompt", "a", "--split", "test"], "unknown --split"),
        (["--prompt", "a", "--max-tokens", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(mixtral, tmp_path, capsys, flags, said):
    assert main(["record", str(mixtral), "--out", str(tmp_path / "r.parquet"), *flags]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_record_takes_no_text_of_its_own(mixtral, tmp_path, capsys):
    recorded(mixtral, tmp_path / "r.parquet", "--prompt", WORDS)
    assert main(["report", str(tmp_path / "r.parquet"), "--prompt", "b"]) == 2
    assert "is a record of a text that was read" in capsys.readouterr().err
