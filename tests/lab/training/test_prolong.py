"""The schedule 'wsd': its learning rate, and runs that are made longer in place or from an earlier checkpoint."""

import json
import shutil

import pytest
from tiny_run import FLAGS
from whole_run import same_run

from remoe.lab.cli.main import main
from remoe.lab.training.checkpoint import list_checkpoints
from remoe.lab.training.config import OptimOptions
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.optimizer import learning_rate

WSD = ["--optim.schedule", "wsd", "--optim.decay-ratio", "0.5", "--optim.warmup-ratio", "0.25"]


def train(corpus, out, steps, *flags):
    return main(["train", "--data", str(corpus), "--out", str(out), "--steps", str(steps), *FLAGS, *flags])


def test_the_learning_rate_of_each_step():
    options = OptimOptions(lr=1.0, schedule="wsd", decay_ratio=0.4, warmup_ratio=0.2, final_lr_ratio=0.0)
    rates = [learning_rate(step, 10, options) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    early = OptimOptions(lr=1.0, schedule="wsd", decay_ratio=1.0, warmup_steps=2, final_lr_ratio=0.5)
    assert [learning_rate(step, 6, early) for step in range(1, 7)] == pytest.approx([0.5, 1, 0.875, 0.75, 0.625, 0.5])


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A finished run of 8 steps, which falls from step 4 on; and one of 12 steps with the same warm-up, from 6 on."""
    root = tmp_path_factory.mktemp("wsd")
    assert train(corpus, root / "short", 8, *WSD, "--checkpoint.keep", "1") == 0
    kept = ["--checkpoint.every", "4", "--checkpoint.keep", "4"]
    assert train(corpus, root / "long", 12, *WSD, "--optim.warmup-steps", "2", *kept) == 0
    return root


def test_a_branch_of_a_finished_run_equals_a_run_that_was_longer_from_the_start(runs, tmp_path):
    checkpoints = list_checkpoints(runs / "short" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000008"]  # where it falls, and its end
    before = {path: path.read_bytes() for path in (runs / "short").rglob("*") if path.is_file()}
    out = tmp_path / "branch"
    assert main(["train", "--resume", "--from", str(checkpoints[0]), "--out", str(out), "--steps", "12"]) == 0
    same_run(runs / "long", out)
    assert RunFolder(out).load_config().optim.warmup_steps == 2
    assert json.loads((out / "summary.json").read_text())["steps"] == 12
    assert {path: path.read_bytes() for path in (runs / "short").rglob("*") if path.is_file()} == before


def test_a_branch_of_a_longer_run_can_decay_at_once(runs, tmp_path):
    checkpoint, out = runs / "long" / "checkpoints" / "step-00000004", tmp_path / "branch"  # two steps before it falls
    assert main(["train", "--resume", "--from", str(checkpoint), "--out", str(out), "--steps", "8"]) == 0
    same_run(runs / "short", out)
    rates = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rates[3] > rates[4] > rates[5] > rates[6] > rates[7]


@pytest.mark.slow
def test_a_run_in_its_stable_part_is_prolonged_in_place(runs, tmp_path):
    out = shutil.copytree(runs / "short", tmp_path / "run")
    shutil.rmtree(list_checkpoints(out / "checkpoints")[-1])  # as if it had been stopped at step 4
    assert main(["train", "--resume", "--out", str(out), "--steps", "12"]) == 0
    same_run(runs / "long", out)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "{short}", "--steps", "12"], "its learning rate has fallen since step 4; branch off there: remoe"),
        (["--from", "{four}", "--out", "{new}", "--steps", "7"], "would have to fall from step 3 on"),
        (["--from", "{four}", "--steps", "12"], "name its folder with --out"),
        (["--from", "{short}", "--out", "{new}"], "not a checkpoint of a run"),
        (["--from", "{four}", "--out", "{long}"], "already holds a run"),
        (["--out", "{long}", "--steps", "12", "--optim.decay-ratio", "0.25"], "--optim.decay-ratio 0.25: it was"),
    ],
)
def test_what_the_schedule_does_not_allow_is_one_line(runs, tmp_path, capsys, flags, words):
    four = list_checkpoints(runs / "short" / "checkpoints")[0]
    places = {"short": runs / "short", "long": runs / "long", "four": four, "new": tmp_path / "new"}
    assert main(["train", "--resume", *(flag.format_map(places) for flag in flags)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "new").exists()


def test_a_cosine_cannot_be_prolonged(corpus, uninterrupted, capsys):
    assert train(corpus, uninterrupted, 30, "--resume") == 2
    error = capsys.readouterr().err.strip()
    assert "falls along a cosine of 24 steps; only a run that was started with --optim.schedule wsd" in error
    assert "\n" not in error
