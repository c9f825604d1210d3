"""Variants that start from a checkpoint."""

import json
import shutil

import pytest
import torch
from tiny_run import FLAGS

from remoe.errors import ConfigError
from remoe.lab.cli.main import main
from remoe.lab.compare.experiment import experiment_from_dict, with_steps
from remoe.lab.training.load import load_run

STEPS = 2


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    """A run with router topk and its relufied model."""
    root = tmp_path_factory.mktemp("models")
    flags = ["--router", "topk", "--steps", "1", *FLAGS]
    assert main(["train", "--data", str(corpus), "--out", str(root / "topk"), *flags]) == 0
    convert = ["convert", "relufy", str(root / "topk"), str(root / "relufied"), "--data", str(corpus)]
    assert main([*convert, "--sample-tokens", "256", "--max-loss-increase", "10"]) == 0
    return root


def study(models, **topk):
    base = {"steps": STEPS, "seq_len": 32, "batch_size": 4, "micro_batch_size": 2}
    variants = {"topk": {"from": str(models / "topk")} | topk, "relufied": {"from": str(models / "relufied")}}
    return {"base": base, "variants": variants, "equal_flops": False}


def runs_of(content):
    return {run.variant: run for run in experiment_from_dict(content, "study", "study.yaml").runs}


def test_a_run_has_the_options_of_its_model_and_the_weights_in_its_key(models, tmp_path):
    runs = runs_of(study(models))
    assert [run.config.router for run in runs.values()] == ["topk", "relu"]
    assert {run.config.model.hidden_size for run in runs.values()} == {32}
    assert runs["relufied"].label == "tiny-relu-relufied-seed0"
    longer = with_steps(runs["relufied"], 7, "-longer").config
    assert (longer.steps, longer.router_options) == (7, runs["relufied"].config.router_options)
    moved = shutil.copytree(models / "relufied", tmp_path / "moved")
    assert runs_of(study(models) | {"variants": {"v": {"from": str(moved)}}})["v"].key == runs["relufied"].key
    model, *_ = load_run(models / "topk")
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "changed")
    other = study(models) | {"variants": {"v": {"from": str(tmp_path / "changed")}}}
    assert runs_of(other)["v"].key != runs["topk"].key


def test_what_contradicts_the_model_names_variant_and_option(models):
    with pytest.raises(ConfigError, match=r"variant topk: --num-experts 8: the model in .* has 4"):
        runs_of(study(models, num_experts=8))
    with pytest.raises(ConfigError, match=r"variant topk: .*no model there"):
        runs_of(study(models, **{"from": str(models / "none")}))


@pytest.mark.slow
def test_the_comparison_trains_them_and_finds_them_again(models, corpus, tmp_path, forked_runs, no_figures, capsys):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(json.dumps(study(models)))
    command = ["compare", str(path), "--data", str(corpus), "--pool", str(tmp_path / "pool"), "--out", str(out)]
    command += ["--device", "cpu"]
    assert main(command) == 0
    rows = json.loads((out / "results.json").read_text())
    folders = list((tmp_path / "pool").glob("*/start.json"))
    starts = {path.parent.name.split("-seed")[0]: json.loads(path.read_text()) for path in folders}
    assert starts.keys() == {"tiny-topk-topk", "tiny-relu-relufied"}
    assert starts["tiny-topk-topk"]["from"].startswith(str(models / "topk"))
    assert "relufied" in json.dumps(rows)
    times = [path.stat().st_mtime_ns for path in folders]
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in folders] == times
