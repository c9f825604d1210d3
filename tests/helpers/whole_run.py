"""A run of 24 steps that tests stop, damage and resume; it must end like one that nothing happened to."""

import json
import time
from pathlib import Path

import forked
import torch
from safetensors.torch import load_file
from tiny_run import FLAGS

from remoe.lab.cli.main import main
from remoe.lab.training.checkpoint import list_checkpoints

STEPS = 24


def train(corpus, out, *flags):
    return main(["train", "--data", str(corpus), "--out", str(out), "--steps", str(STEPS), *FLAGS, *flags])


def arguments(corpus, out, *flags) -> list[str]:
    command = ["train", "--data", str(corpus), "--out", str(out), "--steps", str(STEPS), *FLAGS]
    return [*command, "--checkpoint.every", "5", *flags]


def start(argv, folder):
    return forked.start(argv, folder / "output", folder / "errors")


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def steps_recorded(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(out / "checkpoints")[-1] / "model.safetensors")


def same_run(a: Path, b: Path):
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for x, y in zip(*(map(json.loads, (p / "metrics.jsonl").read_text().splitlines()) for p in (a, b)), strict=True):
        of_the_machine = {"tokens_per_second": 0, "memory_bytes": 0}
        assert x | of_the_machine == y | of_the_machine
