"""A run that starts from a relufied model of transformers, one of whose layers is dense: every command takes it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import remoe
from remoe.costs import parameters
from remoe.lab.analysis.source import open_source
from remoe.lab.cli.main import main
from remoe.lab.report.contents import facts
from remoe.lab.report.sections import training_of
from remoe.lab.training.cost import relufied_flops
from remoe.lab.training.load import load_run
from remoe.lab.training.origin import open_origin
from remoe.models.plan import training_flops

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
DENSE_FIRST = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
STEPS, BATCH, LENGTH = 3, 2, 32


def relufied(model, folder: Path, corpus: Path) -> Path:
    remoe.relufy(model, [torch.arange(120).view(4, 30)], max_loss_increase=None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory) -> Path:
    """A relufied Qwen3-MoE with a dense and a mixed layer."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **DENSE_FIRST, head_dim=8))
    return relufied(model, tmp_path_factory.mktemp("relufied") / "model", corpus)


@pytest.fixture(scope="module")
def run(start, corpus) -> Path:
    """That model after some steps of training."""
    out = start.parent / "run"
    data = ["--from", str(start), "--data", str(corpus), "--out", str(out), "--device", "cpu"]
    sizes = ["--steps", str(STEPS), "--batch-size", str(BATCH), "--seq-len", str(LENGTH)]
    assert main(["train", *data, *sizes]) == 0
    return out


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_flops_are_those_of_the_layers_that_the_model_has(run):
    D, F, V, head, heads, groups, wide, E = 32, 16, 300, 8, 4, 2, 48, 4
    attention = 2 * (2 * D * head * (heads + groups) + 2 * heads * head * LENGTH)
    fixed, expert = attention + 3 * D * wide + D * E + D * V, 3 * D * F
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    active = sum(E * (1 - record["sparsity"]) for record in records)
    expected = 6 * BATCH * LENGTH * (STEPS * fixed + expert * active)
    summary = summary_of(run)
    assert summary["flops"] == pytest.approx(expected)
    total = sum(weight.numel() for weight in load_run(run)[0].parameters())
    unused = 3 * D * F * E * summary["validation"]["all"]["sparsity"]
    assert (summary["total_parameters"], summary["active_parameters"]) == (total, round(total - unused))


def test_a_model_whose_layers_are_all_mixtures_costs_what_one_of_ours_does(corpus, tmp_path):
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    origin = open_origin(relufied(model, tmp_path / "model", corpus))
    config = origin.base({}, "flags")
    fixed, routed = relufied_flops(model, LENGTH)
    assert fixed + 0.3 * routed == pytest.approx(training_flops(origin.configured(config), LENGTH, 1, [0.7]))
    assert parameters(origin.sizes(config))[0] == sum(weight.numel() for weight in model.parameters())


def test_eval_measures_it_and_turns_its_dial(run, tmp_path):
    figures = {}
    for name, flags in {"run": [], "capped": ["--max-experts", "1"]}.items():
        assert main(["eval", str(run), "--json", str(tmp_path / "e.json"), *flags]) == 0
        figures[name] = json.loads((tmp_path / "e.json").read_text())["all"]
        (tmp_path / "e.json").unlink()
    summary = summary_of(run)["validation"]["all"]
    assert figures["run"] == pytest.approx({name: summary[name] for name in figures["run"]})
    assert figures["capped"]["sparsity"] >= 0.75 > figures["run"]["sparsity"]
    assert main(["eval", str(run), "--sweep-threshold", "0,100", "--json", str(tmp_path / "s.json")]) == 0
    points = json.loads((tmp_path / "s.json").read_text())["points"]
    assert [point["active_experts"] for point in points] == [pytest.approx(4 * (1 - summary["sparsity"])), 0]


def test_report_shows_its_training(run, tmp_path):
    source = open_source(str(run), max_tokens=LENGTH)
    record = source.record(tmp_path / "record.parquet")
    training, found = training_of(source, STEPS), facts(source, record.about, STEPS)
    assert training["target"] == 0.5
    assert training["plots"].keys() >= {"lm_loss", "lambda", "sparsity"}
    assert found["trained"] == f"{STEPS} steps of {BATCH * LENGTH} tokens"
    assert found["validation sparsity"].endswith("(target: 0.5)")
    assert found["model"] == "RelufiedQwen3MoeForCausalLM"


def test_export_is_the_same_model_with_a_card(run, corpus, tmp_path, capsys):
    out = tmp_path / "export"
    assert main(["export", str(run), str(out), "--license", "mit"]) == 0
    assert f"remoe.load_relufied({str(out)!r})" in capsys.readouterr().out
    card, exported = (out / "README.md").read_text(), remoe.load_relufied(out)
    assert "library_name: remoe" in card
    assert "class `Qwen3MoeForCausalLM` with 1 layer of 4 experts" in card
    assert f"{summary_of(run)['validation_loss']:.4f}" in card
    trained = load_run(run)[0].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in exported.state_dict().items())
    again = ["--from", str(out), "--data", str(corpus), "--out", str(tmp_path / "again"), "--steps", "0"]
    assert main(["train", *again, "--seq-len", str(LENGTH), "--device", "cpu"]) == 0
    assert summary_of(tmp_path / "again")["start"]["validation"]["all"]["loss"] == summary_of(run)["validation_loss"]


@pytest.mark.parametrize("flags", [["--max-experts", "1"], ["--quantize", "int8"]], ids=str)
def test_forms_that_it_does_not_have_are_one_line(run, tmp_path, capsys, flags):
    assert main(["export", str(run), str(tmp_path / "out"), *flags]) == 2
    assert "which cannot be exported with a cap or quantised" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapters_are_merged_in_all_that_the_run_gives_away(start, corpus, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    data = ["--from", str(start), "--data", str(corpus), "--out", str(out), "--device", "cpu"]
    sizes = ["--steps", str(STEPS), "--batch-size", str(BATCH), "--seq-len", str(LENGTH)]
    assert main(["train", *data, *sizes, "--lora.rank", "2", "--optim.lr", "1e-2"]) == 0
    summary = summary_of(out)
    assert summary["validation_loss"] < summary["start"]["validation"]["all"]["loss"]
    assert main(["eval", str(out), "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())["all"]["loss"]
    assert measured == pytest.approx(summary["validation_loss"], abs=1e-5)  # of the model with adapters beside
    assert main(["export", str(out), str(tmp_path / "export")]) == 0
    ids = torch.arange(60).view(2, 30)
    merged, exported, before = load_run(out)[0], remoe.load_relufied(tmp_path / "export"), remoe.load_relufied(start)
    with torch.no_grad():
        assert torch.equal(exported.eval()(ids).logits, merged(ids).logits)
        assert not torch.allclose(exported(ids).logits, before.eval()(ids).logits)
    assert exported.state_dict().keys() == before.state_dict().keys()
    total = sum(weight.numel() for weight in before.parameters())
    assert summary["total_parameters"] == total
