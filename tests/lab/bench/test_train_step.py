"""The benchmark of a training step runs, and says what it needs. No time is tested."""

import json
import sys

import forked
import pytest

from remoe.errors import ConfigError, ExtraError
from remoe.lab.bench import roofline
from remoe.lab.bench import train_step as module
from remoe.lab.bench.train_step import REFERENCE, TrainStepOptions, TrainStepResult, train_step
from remoe.lab.cli.main import main

SMALL = {
    "seq_len": 32,
    "batch_size": 4,
    "micro_batch_size": 2,
    "num_experts": 4,
    "device": "cpu",
    "model": {"hidden_size": 32, "num_hidden_layers": 2},
}


@pytest.mark.slow
def test_rows_of_ours_and_of_the_reference(corpus, monkeypatch):
    pytest.importorskip("accelerate")
    context = forked.context()
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda method: context)  # three imports of torch less
    ours = ("remoe relu", "remoe topk")
    options = TrainStepOptions("tiny", str(corpus), settle=3, rounds=2, steps=2, contestants=ours, config=SMALL)
    result = train_step(options)
    assert [row["name"] for row in result.rows] == [*ours, REFERENCE]
    vocabulary = result.details["model"]["vocab_size"]
    for row in result.rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 * 4 * 32 / row["ms_per_step"])
        assert row["ratio_to_reference"] > 0
        assert row["model_flops"] == pytest.approx(
            row["tokens_per_second"] * flops_per_token(vocabulary, row["sparsity"])
        )
        assert (row["sparsity"] is None) == row["name"].startswith("mixtral")
        assert len(result.details["ms_per_step"][row["name"]]) == 2
    reference = next(row for row in result.rows if row["name"] == REFERENCE)
    assert reference["ratio_to_reference"] == 1
    assert result.rows[1]["sparsity"] == 0.75
    json.dumps({"rows": result.rows, "details": result.details})


def flops_per_token(vocabulary: int, sparsity: float | None) -> float:
    """By hand: projections of 4 heads and 2 groups, attention, experts of width 4 D, head; D = 32, S = 32."""
    experts = 1.0 if sparsity is None else 4 * (1 - sparsity)
    layer = 2 * 32 * 32 * 1.5 + 2 * 32 * 32 + 3 * 32 * 128 * experts
    return 6 * (2 * layer + 32 * vocabulary)


def test_the_command_prints_a_table_and_writes_the_json(tmp_path, monkeypatch, capsys):
    asked = []
    row = {"name": "remoe relu", "tokens_per_second": 9.0, "ms_per_step": 1.0, "ratio_to_reference": 2.0}
    row["model_flops"] = 5e10
    result = TrainStepResult([row | {"sparsity": None}], {"steps": 5})
    monkeypatch.setattr(module, "train_step", lambda options: asked.append(options) or result)
    monkeypatch.setattr(roofline, "measure_roofline", lambda device, dtype: roofline.Roofline(2e11, 1e11, 3e10))
    assert main(["bench", "train-step", "--out", str(tmp_path / "step.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "remoe relu" in out
    assert "100 GFLOP/s, memory reads 30.0 GB/s" in out
    written = json.loads((tmp_path / "step.json").read_text())
    assert (written["rows"], written["details"]) == (result.rows, result.details)
    assert written["rows"][0]["share_of_gemm_rate"] == 0.25
    assert written["machine"]["torch"]
    assert written["roofline"]["gemm_flops"] == 2e11
    assert main(["bench", "train-step", "--quick"]) == 0
    assert "Left out by --quick: remoe topk, remoe dense, " in " ".join(capsys.readouterr().out.split())
    quick = asked[1]
    assert (quick.contestants, quick.rounds, quick.steps, quick.biased) == (("remoe relu",), 3, 1, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contestants": ("remoe relu", "gpt")}, "unknown contestant 'gpt'"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"config": {"k": 9}}, "k = 9"),
    ],
)
def test_bad_options_are_named(corpus, options, words):
    pytest.importorskip("accelerate")
    with pytest.raises(ConfigError, match=words):
        train_step(TrainStepOptions(data=str(corpus), **options))


def test_missing_accelerate_is_named(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ExtraError, match=r"needs accelerate: pip install 'remoe\[bench\]'"):
        train_step(TrainStepOptions(data=str(corpus)))


def test_both_train_the_same_shape_on_the_same_tokens(corpus):
    """The Mixtral contestants read the windows that `remoe train` reads, in its order."""
    from remoe.lab.data import TrainBatches, open_dataset
    from remoe.lab.training.config import config_from_dict

    config, dataset = config_from_dict({"preset": "tiny", **SMALL}, "test"), open_dataset(corpus)
    windows = module._Windows(config, dataset)
    batch = TrainBatches(dataset.train, 32, 4, config.seed).batch(3)
    for row in range(4):
        assert windows[3 * 4 + row]["input_ids"].equal(batch[row, :-1])
