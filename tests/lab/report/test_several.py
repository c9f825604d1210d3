"""The comparison of models: its numbers are those of an independent computation, and only one text is compared."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tiny_run import FLAGS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import remoe
from remoe.errors import DataError
from remoe.lab.analysis.record import About, RecordWriter, RoutingRecord
from remoe.lab.cli.main import main
from remoe.lab.data import PrepareOptions, load_tokenizer, open_dataset, prepare
from remoe.lab.report.packed import unpacked
from remoe.lab.report.several.aligned import align, common_ends
from remoe.lab.report.several.excerpts import excerpts_of
from remoe.lab.report.several.measures import octaves
from remoe.lab.report.several.models import Compared
from remoe.lab.report.several.page import comparison_data, render
from remoe.lab.report.several.training import training_from

WORDS = ["the", " cow", " sees", " a", " barn"]
T = 24


def record(active_LTE, loss_T=None, *, domains=("farm", "town"), texts=None, token_T=None):
    """A record of two domains of two sequences each."""
    token_T = torch.arange(len(active_LTE[0])) % len(WORDS) if token_T is None else token_T
    count = len(token_T)
    texts = [WORDS[token] for token in token_T.tolist()] if texts is None else texts
    domain_T, sequence_T = torch.arange(count) * 2 // count, torch.arange(count) * 4 // count
    gate_LTE = torch.rand(active_LTE.shape) * active_LTE
    return RoutingRecord.of(
        active_LTE, token_T, domain_T, sequence_T, list(domains), gate_LTE=gate_LTE, loss_T=loss_T, texts=texts
    )


def content_of(page):
    return json.loads(re.search(r'id="content" type="application/json">(.*)</script>', page.read_text())[1])


def rows_of(data):
    return {row["name"]: row["values"] for row in data["measures"]}


def layers_mean(active_LTE, of_layer):
    """Mean of a measure over the layers, each in proportion to its pairs."""
    pairs = [int(active_TE.sum()) for active_TE in active_LTE]
    return sum(n * of_layer(one.tolist()) for n, one in zip(pairs, active_LTE, strict=True)) / sum(pairs)


def imbalance(active_TE):
    loads = [sum(column) for column in zip(*active_TE, strict=True)]
    return max(loads) / (sum(loads) / len(loads))


def reuse(active_TE):
    shares = []
    for t in range(len(active_TE) - 1):
        here, then = ({e for e, on in enumerate(active_TE[i]) if on} for i in (t, t + 1))
        if here and (t + 1) % (T // 4):  # not at the end of a sequence
            shares.append(len(here & then) / len(here))
    return sum(shares) / len(shares)


def test_measures_equal_an_independent_computation():
    masks = [torch.rand(2, T, 4) < 0.4, torch.rand(3, T, 6) < 0.3]
    masks[1][1, :, 2] = False  # a dead expert
    losses = [torch.rand(T) * 3, torch.rand(T) * 3]
    losses[1][5] = torch.nan
    data = comparison_data(
        [Compared(name, "any", record(*one)) for name, one in zip("ab", zip(masks, losses, strict=True), strict=True)],
        9,
    )
    rows = rows_of(data)
    assert rows["loss, nats per token"] == pytest.approx([loss_T.nanmean().item() for loss_T in losses], rel=1e-4)
    assert rows["loss on town"] == pytest.approx([loss_T[12:].mean().item() for loss_T in losses], rel=1e-4)
    active = [mask.sum().item() / (len(mask) * T) for mask in masks]
    assert rows["experts per token and layer"] == pytest.approx(active, rel=1e-3)
    assert rows["sparsity S"] == pytest.approx([1 - active[0] / 4, 1 - active[1] / 6], rel=1e-3)
    assert rows["experts per layer"] == [4, 6]
    assert rows["load, busiest / mean"] == pytest.approx([layers_mean(mask, imbalance) for mask in masks], rel=1e-3)
    assert rows["reuse"] == pytest.approx([layers_mean(mask, reuse) for mask in masks], rel=1e-3)
    dead = [(mask.sum(dim=1) / T < 1 / 8 / mask.shape[2]).double().mean().item() for mask in masks]
    assert dead[1] > 0
    assert rows["dead experts, share"] == pytest.approx(dead, rel=1e-3)
    assert data["layers"][1]["active"] == pytest.approx((masks[1].sum(dim=(1, 2)) / T).tolist(), rel=1e-3)
    assert "training" not in data


def test_known_differences():
    mask, loss_T = torch.rand(2, T, 4) < 0.4, torch.rand(T)
    mask[:, :, 3] = False
    more = mask.clone()
    more[0, :, 3] = True
    data = comparison_data(
        [Compared("a", "relu", record(mask, loss_T)), Compared("b", "relu", record(more, loss_T + 0.25))], 8
    )
    difference = {name: values[1] - values[0] for name, values in rows_of(data).items() if None not in values}
    assert difference["loss, nats per token"] == pytest.approx(0.25, abs=1e-4)
    assert difference["experts per token and layer"] == pytest.approx(0.5, abs=1e-3)
    assert difference["sparsity S"] == pytest.approx(-1 / 8, abs=1e-3)
    farm, town = data["text"]
    assert (farm["spans"], farm["ends"], town["domain"]) == (8, None, "town")
    assert farm["tokens"] == [WORDS[t % 5] for t in range(8)]
    counts = [unpacked(one["counts"]) for one in farm["models"]]
    np.testing.assert_array_equal(counts[1] - counts[0], [[1] * 8, [0] * 8])


def test_domains_are_matched_by_name():
    mask = torch.rand(1, T, 4) < 0.5
    turned = torch.cat([mask[:, 12:], mask[:, :12]], dim=1)
    token_T = torch.arange(T) % 5
    first = record(mask, token_T=token_T)
    second = record(turned, token_T=torch.cat([token_T[12:], token_T[:12]]), domains=("town", "farm"))
    data = comparison_data([Compared("a", "any", first), Compared("b", "any", second)], 99)
    one, two = data["experts"]["models"]
    assert one["domainShare"] == two["domainShare"]
    for text in data["text"]:
        assert text["models"][0]["counts"] == text["models"][1]["counts"]


def test_a_model_without_routing_has_its_training_alone():
    records = [{"step": 1, "lm_loss": 3.0, "tokens_per_second": 50.0}]
    trained = training_from(iter(records), experts=1, k=1, target=None, tokens_per_step=64)
    routed = Compared("b", "relu", record(torch.ones(1, T, 2).bool()))
    data = comparison_data([Compared("a", "dense", None, training=trained), routed], 9)
    assert data.keys() == {"head", "measures", "training"}
    rows = rows_of(data)
    assert rows["training speed, tokens/s"] == [50, None]
    assert rows["experts per token and layer"] == [None, 2]
    text = render(data)
    assert "no routing to compare" in text
    assert 'id="text"' not in text


def test_texts_are_cut_where_all_tokenizers_end_a_token():
    ends = common_ends([np.array([3, 0, 2, 4]), np.array([1, 2, 6, 0]), np.array([3, 6])])
    assert [one.tolist() for one in ends] == [[1, 4], [2, 3], [1, 2]]  # after 3 and 9 characters


def tokenizer_of(words):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *words])}, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def test_different_tokens_are_aligned_by_characters():
    pieces = [["farm", " yard", "\n", "sun", "set", "", " ok"], ["farmyard", " su", "ns", "et", " ", "ok"]]
    made, losses = [], []
    for texts in pieces:
        active_LTE = torch.rand(2, len(texts), 4) < 0.5
        losses.append(torch.rand(len(texts)))
        zero_T = torch.zeros(len(texts), dtype=torch.int64)
        made.append(
            RoutingRecord.of(
                active_LTE, torch.arange(len(texts)), zero_T, zero_T, ["x"], loss_T=losses[-1], texts=texts
            )
        )
    compared = [Compared(name, "any", one) for name, one in zip("ab", made, strict=True)]
    aligned = align(compared)
    assert not aligned.tokens
    assert aligned.characters == [len("farm yard\nsunset ok")]
    (text,) = excerpts_of(made, aligned, 99)
    assert [unpacked(one).tolist() for one in text["ends"]] == [[2, 5, 7], [1, 4, 6]]  # farmyard, sunset, ok
    assert [unpacked(one).tolist() for one in excerpts_of(made, aligned, 5)[0]["ends"]] == [[2, 5], [1, 4]]
    rows = rows_of(comparison_data(compared, 9))
    expected = [loss_T.sum().item() / aligned.characters[0] for loss_T in losses]
    assert rows["loss, nats per character"] == pytest.approx(expected, rel=1e-4)


def test_special_tokens_are_not_part_of_the_text():
    tokenizer = tokenizer_of(["cow", "barn"])
    zero_T = torch.zeros(4, dtype=torch.int64)
    ended = RoutingRecord.of(torch.rand(1, 4, 2) < 0.5, torch.tensor([1, 0, 2, 0]), zero_T, zero_T, ["x"])
    plain = RoutingRecord.of(
        torch.rand(1, 2, 2) < 0.5, torch.tensor([5, 6]), zero_T[:2], zero_T[:2], ["x"], texts=["cow", "barn"]
    )
    aligned = align([Compared("a", "any", ended, tokenizer), Compared("b", "any", plain)])
    assert [end_N.tolist() for end_N in aligned.ends[0]] == [[1, 3], [1, 2]]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"texts": ["the"] * T, "token_T": torch.zeros(T, dtype=torch.int64)},
            "in domain 'farm' at character 4, 'thecow",
        ),
        ({"token_T": torch.arange(T + 4) % 5}, "read different texts"),
        ({"domains": ("farm", "sea")}, "b reads other domains than a: farm, sea, not farm, town"),
        ({"token_T": torch.full((T,), -1), "texts": [None] * T}, "b does not have the text of its tokens"),
    ],
)
def test_different_texts_are_refused_in_one_line(other, said):
    count = len(other.get("token_T", torch.zeros(T)))
    compared = [Compared("a", "any", record(torch.ones(1, T, 2).bool()))]
    compared.append(Compared("b", "any", record(torch.ones(1, count, 2).bool(), **other)))
    with pytest.raises(DataError, match=re.escape(said)) as error:
        comparison_data(compared, 9)
    assert "\n" not in str(error.value)


def test_training_is_measured_from_its_records():
    def at(step):
        found = {"step": step, "lm_loss": 10 - step / 100, "sparsity": 0.5 if step <= 100 else 0.7 + step % 2 / 10}
        return (
            found
            | {"tokens_per_second": 100.0 * step, "load_per_expert": [[0.3, 0.1], [0.0, 0.1]]}
            | ({"flip_rate": step / 1000} if step % 50 == 0 else {})
        )

    found = training_from(map(at, range(1, 201)), experts=2, k=1, target=0.5, tokens_per_step=64)
    assert found.figures == pytest.approx(
        {"sparsity_mean": 0.75, "sparsity_deviation": 0.05, "flip_rate": 0.175, "tokens_per_second": 10050}
    )
    np.testing.assert_allclose(unpacked(found.plots["imbalance"]["values"]), (0.3 + 0.1) / (0.2 + 0.05), rtol=1e-6)
    assert set(unpacked(found.plots["dead"]["values"])[0].tolist()) == {0.25}
    assert unpacked(found.plots["flip_rate"]["step"]).tolist() == [50, 100, 150, 200]
    assert training_from(iter(()), experts=2, k=1, target=0.5, tokens_per_step=64) is None


def test_means_of_token_ids_of_similar_counts():
    found = octaves([10, 15, 16, 31, 40], [1.0, 2.0, 1.0, 3.0, 0.5])
    assert found == {"at": [12.5, 23.5, 40.0], "mean": [1.5, 2.0, 0.5]}


def write_record(path, active_LTE):
    L, count, E = active_LTE.shape
    with RecordWriter(path, About(L, E, 1, "relu", gates=False)) as writer:
        writer.append(
            sequence_T=torch.zeros(count, dtype=torch.int64), domains=["farm"] * count, active_LTE=list(active_LTE),
            token_T=torch.arange(count) % 5, texts=[WORDS[t % 5] for t in range(count)],
        )  # fmt: skip


def test_records_are_compared_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in ("a.parquet", "b.parquet", "other/b.parquet"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_record(tmp_path / path, torch.rand(1, T, 4) < 0.4)
    assert main(["report", "a.parquet", "b.parquet", "other/b.parquet"]) == 0
    assert "a-with-b-b.html" in capsys.readouterr().out
    page = tmp_path / "a-with-b-b.html"
    assert "<title>Routing of" in page.read_text()
    content = content_of(page)
    names = [model["name"] for model in content["head"]["models"]]
    assert names == [f"{tmp_path.name}/a", f"{tmp_path.name}/b", "other/b"]
    assert content["head"]["aligned"] == "tokens"
    for wrong, said in (
        ([], "MODEL missing"),
        (
            ["a.parquet", "b.parquet", "--effect-tokens", "9"],
            "--effect-tokens, --dial-tokens and --generate are for one model",
        ),
        (["a.parquet", "b.parquet", "--prompt", "cow"], "--data and --prompt do not go with them"),
        (["a.parquet"] * 7, "2 to 6 models, not 7"),
        (["a.parquet", "nowhere"], "nowhere does not exist"),
        (["nowhere", "a.parquet"], "nowhere does not exist"),
    ):
        assert main(["report", *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A ReLU and a TopK run with different tokenizers."""
    folder = tmp_path_factory.mktemp("several")
    text = str(corpus.parent / "text")
    small = prepare(
        PrepareOptions(sources=(text,), out=folder / "small", vocab_size=270, validation_fraction=0.1, quiet=True)
    )
    for router, data in (("relu", corpus), ("topk", small)):
        flags = ["--router", router, "--steps", "3", "--data", str(data), "--out", str(folder / router), *FLAGS]
        assert main(["train", *flags]) == 0
    return folder


@pytest.mark.slow
def test_models_with_different_tokenizers_read_the_same_documents(runs, corpus, capsys):
    paths, text = [str(runs / name) for name in ("relu", "topk")], str(corpus.parent / "text" / "farm" / "3.txt")
    assert main(["report", *paths]) == 2  # the first one's data
    assert "prepared with a tokenizer different from that of" in capsys.readouterr().err
    page = runs / "page.html"
    assert main(["report", *paths, "--data", text, "--max-tokens", "60", "--out", str(page)]) == 0
    content = content_of(page)
    assert content["head"]["aligned"] == "characters"
    (excerpt,) = content["text"]
    relu, topk = excerpt["models"][0], excerpt["models"][1]
    assert topk["tokens"] != excerpt["tokens"]
    pieces = [
        ["".join(tokens[start:end]) for start, end in itertools.pairwise([0, *unpacked(ends).tolist()])]
        for tokens, ends in zip((excerpt["tokens"], topk["tokens"]), excerpt["ends"], strict=True)
    ]
    assert len(pieces[0]) > 20
    assert ["".join(piece.split()) for piece in pieces[0]] == ["".join(piece.split()) for piece in pieces[1]]
    whole = Path(text).read_text()
    assert whole.startswith("".join(pieces[0]))
    rows = rows_of(content)
    assert rows["loss, nats per character"][0] == pytest.approx(
        np.nansum(unpacked(relu["loss"])) / len("".join(excerpt["tokens"])), rel=1e-3
    )
    assert rows["experts per token and layer"][1] == 1
    assert rows["training speed, tokens/s"][0] > 0
    assert content["training"][0]["plots"].keys() >= {"lm_loss", "sparsity", "imbalance", "dead"}


@pytest.mark.slow
def test_a_run_its_export_and_mixtures_of_transformers_are_compared(runs, corpus):
    tokenizer, size = load_tokenizer(corpus / "tokenizer"), open_dataset(corpus).vocab_size
    for name in ("mixtral", "relufied"):
        model = tiny_models.build("mixtral", vocab_size=size)
        if name == "relufied":
            remoe.relufy(model, [torch.arange(120).view(4, 30)], max_loss_increase=None)
        model.save_pretrained(runs / name)
        tokenizer.save_pretrained(runs / name)
    assert main(["export", str(runs / "relu"), str(runs / "export")]) == 0
    paths, page = [str(runs / name) for name in ("relu", "export", "mixtral", "relufied")], runs / "four.html"
    assert main(["report", *paths, "--max-tokens", "60", "--out", str(page)]) == 0
    content = content_of(page)
    assert content["head"]["aligned"] == "tokens"
    rows = rows_of(content)
    run, export, mixtral, relufied = rows["experts per token and layer"]
    assert run == export
    assert mixtral == 2 != relufied
    losses = rows["loss, nats per token"]
    assert losses[0] == losses[1]
    assert [bool(training) for training in content["training"]] == [True, False, False, False]
