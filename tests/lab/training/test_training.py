"""A run from the command line: what it writes, how it stops, and that it learns."""

import json
import math

import pytest
import reference
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import FLAGS

from remoe.lab.cli.main import main
from remoe.lab.data import ValidationWindows, open_dataset, training_batches
from remoe.lab.training.checkpoint import list_checkpoints
from remoe.lab.training.config import OptimOptions, config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_run
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.metrics import read_metrics
from remoe.lab.training.optimizer import learning_rate
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.trainer import Trainer

REQUIRED = {
    "step", "lm_loss", "reg_loss", "loss", "lambda", "opening", "sparsity", "sparsity_per_layer", "load_per_expert",
    "grad_norm", "tokens_per_second",
}  # fmt: skip


def train(corpus, out, *flags, steps=40):
    return main(["train", "--data", str(corpus), "--out", str(out), "--steps", str(steps), *FLAGS, *flags])


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
def test_a_run_learns_and_leaves_everything_in_its_folder(corpus, tmp_path, capsys, router):
    out = tmp_path / "run"
    assert train(corpus, out, "--router", router, "--validate.every", "10") == 0
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 41))
    assert all(record.keys() >= REQUIRED for record in records)
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5
    for record in records:
        penalised = record["lm_loss"] + record["lambda"] * record["reg_loss"]
        opened = record["loss"] - penalised  # by `opening` times a loss that is never negative
        assert opened == pytest.approx(0, abs=1e-6 * penalised) or (opened > 0 and record["opening"] > 0)
        assert len(record["sparsity_per_layer"]) == len(record["load_per_expert"]) == 2
        mean = sum(record["sparsity_per_layer"]) / 2
        assert record["sparsity"] == pytest.approx(mean, abs=1e-5)
    validated = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validated] == [10, 20, 30, 40]
    assert set(validated[0]["validation_loss_per_domain"]) == {"farm", "town"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["validation_loss"] == validated[-1]["validation_loss"]
    assert (out / "sample.txt").read_text() == summary["sample"]
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("lm_loss")] == list(range(1, 41))
    output = capsys.readouterr().out
    for words in ("sparsity", "tokens/s", "left", "validation loss", str(out)):
        assert words in output
    assert ("  lambda " in output) == (router == "relu")  # where it steers
    first = output[output.index("step      1/40") :].splitlines()[0]
    assert f"  loss {records[0]['lm_loss']:.4f}  " in first  # without the penalty
    assert f"  sparsity {records[0]['sparsity']:.4f}  " in first
    assert f"target sparsity {summary['target_sparsity']:g}, " in output.splitlines()[0]
    assert "target" not in first


def test_lambda_of_a_run_follows_equation_7(corpus, tmp_path):
    out = tmp_path / "run"
    assert train(corpus, out, "--sparsity.rule", "sign", "--sparsity.no-fast-start") == 0
    records = read_metrics(out / "metrics.jsonl")
    course = reference.lambda_course([record["sparsity"] for record in records], 0.75)
    assert [record["lambda"] for record in records] == pytest.approx([1e-8, *course[:-1]], rel=1e-5)


def test_flips_are_those_of_the_weights_before_and_after_a_step(corpus, tmp_path):
    out = tmp_path / "run"
    flags = ["--validate.flips-every", "6", "--checkpoint.every", "1", "--checkpoint.keep", "12"]
    assert train(corpus, out, *flags, steps=12) == 0
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records if "flip_rate" in record] == [6, 12]
    windows = ValidationWindows(open_dataset(corpus).validation, 32)
    firsts = [next(windows.batches(domain, 64)) for domain in windows.domains]  # 4096 tokens of 32 * 2 domains
    masks = []
    for step in (5, 6):
        model = load_run(out / "checkpoints" / f"step-{step:08}")[0]
        gates = [[r.gate_TE for r in model(first[0], attention_mask=first[2]).routings] for first in firsts]
        kept = torch.cat([first[2].flatten() for first in firsts])
        masks.append(torch.stack([torch.cat(layer)[kept] > 0 for layer in zip(*gates, strict=True)]))
    rate = (masks[0] != masks[1]).double().mean().item()
    assert records[5]["flip_rate"] == pytest.approx(rate, abs=1e-9)
    assert rate > 0

    quiet = tmp_path / "quiet"
    assert train(corpus, quiet, steps=12) == 0  # measuring changes nothing
    assert [r["lm_loss"] for r in records] == [r["lm_loss"] for r in read_metrics(quiet / "metrics.jsonl")]


def test_same_seed_same_run_other_seed_other_run(corpus, tmp_path):
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(corpus, tmp_path / name, "--seed", str(seed), steps=8)
        losses.append([record["lm_loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1] != losses[2]


def test_a_loss_that_is_not_finite_stops_before_it_harms(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [
        "--optim.lr",
        "1e30",
        "--optim.warmup-ratio",
        "0",
        "--checkpoint.every",
        "1",
        "--optim.clip",
        "1e30",
    ]
    assert train(corpus, out, *flags) == 2
    error = capsys.readouterr().err
    last = list_checkpoints(out / "checkpoints")[-1]
    assert f"the last good checkpoint is {last}" in error
    assert "step " in error
    assert len(error.strip().splitlines()) == 1
    model, _, _ = load_run(out)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weights_that_are_not_finite_are_not_saved(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--optim.lr", "1e39", "--optim.warmup-ratio", "0", "--checkpoint.every", "1", "--optim.clip", "1e30"]
    assert train(corpus, out, *flags) == 2
    assert "step 1: weights are not finite, not saved" in capsys.readouterr().err
    assert not list_checkpoints(out / "checkpoints")


def test_settling_does_not_depend_on_how_often_records_are_written(corpus, tmp_path):
    summaries = []
    for every in ("1", "7"):
        out = tmp_path / every
        assert train(corpus, out, "--log-every", every, steps=20) == 0
        summaries.append(json.loads((out / "summary.json").read_text()))
    for key in ("final_sparsity", "settling_step", "sparsity_mean", "validation_loss"):
        assert summaries[0][key] == summaries[1][key]


def test_a_run_with_weights_says_what_it_reads(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(corpus, out, "--domain-weights", "farm", "3", "town", "1", steps=6) == 0
    expected = {"farm": 0.75, "town": 0.25}
    windows = training_batches(open_dataset(corpus).train, 32, 4, 0, expected).windows
    epochs = {domain: 6 * 4 * share / windows(domain) for domain, share in expected.items()}
    mixture = json.loads((out / "summary.json").read_text())["mixture"]
    assert {domain: part["share"] for domain, part in mixture.items()} == expected
    assert {domain: part["epochs"] for domain, part in mixture.items()} == pytest.approx(epochs)
    said = f"(times read): farm 0.75 ({epochs['farm']:.2g}), town 0.25 ({epochs['town']:.2g}); device cpu"
    assert said in capsys.readouterr().out
    flags = ["--out", str(out), "--resume", "--domain-weights", "farm", "2", "town", "1"]
    assert main(["train", *flags]) == 2
    assert "with --domain-weights.farm 2.0: it was started with 3.0" in capsys.readouterr().err
    assert train(corpus, tmp_path / "other", "--domain-weights", "farm", "3") == 2
    assert "no weight for town; 0 leaves a domain out" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_accumulation_in_the_trainer_equals_one_batch(corpus, tmp_path):
    dataset = open_dataset(corpus)
    grads = []
    for micro in (4, 1):
        options = {"seq_len": 32, "batch_size": 4, "micro_batch_size": micro, "device": "cpu"}
        model = {"hidden_size": 32, "num_hidden_layers": 2}
        options |= {"num_experts": 4, "router_options": {"load_balance": False}}
        config = config_from_dict({**options, "model": model}, "test")
        trainer = Trainer(config, dataset, RunFolder(tmp_path))
        losses = trainer._backward()
        grads.append(([loss.item() for loss in losses], [p.grad for p in trainer.model.parameters()]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    for whole, parts in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "flags", [["--recompute"], ["--dtype", "bfloat16"], ["--router-options", "max_experts_per_token", "2"]]
)
def test_options_that_change_the_computation_still_learn(corpus, tmp_path, flags):
    out = tmp_path / "run"
    assert train(corpus, out, *flags) == 0
    records = read_metrics(out / "metrics.jsonl")
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5


def test_a_dead_layer_is_reported_once(corpus, tmp_path, caplog):
    options = {"seq_len": 16, "batch_size": 2, "micro_batch_size": 2, "device": "cpu", "steps": 110}
    model = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = config_from_dict({**options, "num_experts": 4, "model": model}, "test")
    trainer = Trainer(config, open_dataset(corpus), RunFolder(tmp_path))
    torch.nn.init.zeros_(trainer.model.model.layers[1].mlp.router.weight)
    progress = ProgressLine(config, 0)
    for _ in range(105):
        trainer._train_step(progress)
    assert caplog.messages == ["step 100: no token was routed for 100 steps in layers [1]"]


def test_a_lambda_that_runs_away_is_reported_once(corpus, tmp_path, caplog):
    """With k = 1 and an entropy penalty: it cannot take a token's last expert, and where S stays a little too low..."""
    options = {"seq_len": 16, "batch_size": 2, "micro_batch_size": 2, "device": "cpu", "steps": 110, "num_experts": 4}
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options |= {"sparsity": {"lambda_init": 900.0, "rule": "sign"}, "router": "relu_scaled"}
    trainer = Trainer(config_from_dict({**options, "model": model}, "test"), open_dataset(corpus), RunFolder(tmp_path))
    trainer.model.sparsity.target_density = 0.0  # S is too low whatever it is
    progress = ProgressLine(trainer.config, 0)
    for _ in range(4):
        trainer._train_step(progress)
    (message,) = [message for message in caplog.messages if "lambda" in message]
    assert message.startswith("step 2: lambda is 1.1e+03 and S ")
    assert message.endswith(", for a target of 1: the penalty no longer controls the experts that are still active")


@pytest.mark.parametrize("factor", [0.5, 1 - 1e-7, 1.0, 2.0, math.nan])
def test_gradients_are_clipped_as_by_torch(factor):
    grad = torch.randn(7, 5)
    max_norm = factor * grad.norm().item() if factor == factor else 1.0
    ours, theirs = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)
    for model in (ours, theirs):  # the bias has none
        model.weight.grad = grad * factor if factor != factor else grad.clone()
    norm = Ranks(Mesh(), "cpu").clip(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, equal_nan=True)  # summed in another order
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-6, atol=0, equal_nan=True)


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    options = OptimOptions(lr=1.0, warmup_ratio=0.1, final_lr_ratio=0.1)
    assert [learning_rate(step, 100, options) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(55, 100, options) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(100, 100, options) == pytest.approx(0.1)


def test_router_options_reach_the_router_and_the_summary_counts_their_pairs(corpus, tmp_path):
    out = tmp_path / "run"
    options = ["--router", "topk", "--router-options", "warmup_k", "3", "warmup_steps", "2", "renormalize", "True"]
    flags = [*FLAGS, "--data", str(corpus), "--out", str(out), "--steps", "4", *options]
    assert main(["train", *flags]) == 0
    densities = [1 - record["sparsity"] for record in read_metrics(out / "metrics.jsonl")]
    assert densities == pytest.approx([3 / 4, 3 / 4, 1 / 4, 1 / 4])
    summary = json.loads((out / "summary.json").read_text())
    dense = 6 * (2 * (2 * 32 * 32 * 1.5 + 2 * 32 * 32 + 32 * 4) + 32 * 1024)
    experts = 6 * 2 * 3 * 32 * 128 * sum(4 * d for d in densities) / 4
    assert summary["flops_per_token"] == pytest.approx(dense + experts, rel=1e-6)
    assert summary["flops"] == pytest.approx(summary["flops_per_token"] * summary["tokens"])
    assert summary["tokens"] == 4 * 4 * 32
    assert summary["total_parameters"] - summary["active_parameters"] == 2 * 3 * 3 * 32 * 128
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["tokens_per_second"] > 0


def test_the_recorded_loss_is_the_one_that_is_trained(corpus, tmp_path):
    options = ["--router", "relu_norm", "--router-options", "locality", "1.0", "--steps", "2"]
    assert main(["train", *FLAGS, "--data", str(corpus), "--out", str(tmp_path / "run"), *options]) == 0
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["loss"] > record["lm_loss"] + record["lambda"] * record["reg_loss"] + 0.1  # the locality loss


def test_names_in_brackets_are_text(tmp_path, capsys):
    rows = [{"text": f"word {i} " * 40, "domain": domain} for i in range(40) for domain in ("C [/c]", "[en] :smile:")]
    (tmp_path / "texts[1].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, out = tmp_path / "data[/x]", tmp_path / "run[bold]"
    assert main(["data", "prepare", str(tmp_path / "texts[1].jsonl"), "--out", str(data), "--vocab-size", "300"]) == 0
    assert main(["data", "check", str(data)]) == 0
    assert main(["train", *FLAGS, "--data", str(data), "--out", str(out), "--steps", "2", "--print-every", "1"]) == 0
    assert main(["eval", str(out)]) == 0
    written = "".join(capsys.readouterr())
    for name in (str(data), str(out), "C [/c]", "[en] :smile:"):
        assert name in written
