"""The example scripts run as a user runs them, on small data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build
from tiny_run import FLAGS

from remoe.lab.cli.main import main
from remoe.lab.data import open_dataset

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_architecture_in_one_line():
    lines = run("relufy_architectures.py", "mixtral", "gpt_oss").splitlines()
    assert [line.split()[0] for line in lines] == ["RelufiedMixtralForCausalLM", "RelufiedGptOssForCausalLM"]
    assert all(line.endswith("save, load: ok") for line in lines)


def test_own_topk_run_is_relufied_and_both_are_trained_on(corpus, tmp_path):
    pytest.importorskip("accelerate")
    topk = tmp_path / "topk"
    assert main(["train", "--data", str(corpus), "--out", str(topk), "--router", "topk", "--steps", "20", *FLAGS]) == 0
    size = ["--steps", "10", "--batch", "2", "--length", "32", "--eval-tokens", "64"]
    run("relufy_topk.py", topk, corpus, "--out", tmp_path / "out", *size)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["relu"]["loss_before"] > 0
    assert result["topk"]["loss_after"] != result["topk"]["loss_before"]
    assert 0 < result["relu"]["sparsity"] < 1
    assert any("lambda" in entry for entry in result["relu"]["log"])


def test_dense_checkpoint_is_upcycled_and_both_are_trained_on(corpus, tmp_path):
    pytest.importorskip("accelerate")
    dataset = open_dataset(corpus)
    model = build("llama", vocab_size=300)
    model.save_pretrained(tmp_path / "dense")
    dataset.load_tokenizer().save_pretrained(tmp_path / "dense")
    size = ["--steps", "10", "--batch", "2", "--length", "32", "--eval-tokens", "64"]
    run("upcycle_smollm2.py", tmp_path / "dense", corpus, "--out", tmp_path / "out", *size)
    dense, ours = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("dense", "remoe"))
    assert ours["logits_differ_by"] < 1e-5
    assert ours["loss_before"] == pytest.approx(dense["loss_before"], rel=1e-5)
    assert ours["loss_after"] != ours["loss_before"]
    assert 0 < ours["sparsity"] < 1


def test_grpo_replays_the_pairs_of_a_bfloat16_pass_and_steers_lambda():
    pytest.importorskip("trl")
    steps = [line.split() for line in run("grpo_replay.py", "--steps", "3").splitlines() if line.startswith("step")]
    assert len(steps) == 3
    differ, lam, sparsity = ([float(words[i].rstrip("%")) for words in steps] for i in (5, 7, 9))
    assert all(0 <= share < 5 for share in differ)  # between bfloat16 and float32
    assert sum(differ) > 0
    assert all(0 < s < 0.875 for s in sparsity)
    assert lam == pytest.approx([1e-3 * 1.2 ** (i + 1) for i in range(3)], rel=0.01)  # too dense: once a step, upward
