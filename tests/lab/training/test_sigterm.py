"""Under torchrun: SIGTERM, as schedulers send it, stops all ranks after one step; a killed rank is named in one line.

The stopped ranks read a stream, so its place in a checkpoint of two ranks is tested too.
"""

import json
import os
import re
import signal
import sys
import time

import forked
import psutil
import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks
from small_data import make_texts, write_jsonl
from tiny_run import FLAGS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from whole_run import steps_recorded

from remoe.lab.cli.main import main
from remoe.lab.training.checkpoint import list_checkpoints, verify
from remoe.lab.training.shards import opened
from remoe.lab.training.words import LOG

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
GRACE = 30  # seconds that torchrun gives its processes
STEPS = 16
MEASURED = re.compile("per_second|share|memory")


def _torchrun(argv):
    """torchrun's agent, with functions in place of commands, which would import everything anew."""
    endpoint = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "test"}
    config = LaunchConfig(1, 1, 2, start_method="fork", max_restarts=0, monitor_interval=0.1, **endpoint)
    elastic_launch(config, _command)(argv)


def _torchrun_into(path, argv):
    """The same, with what goes to standard error in a file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    _torchrun(argv)


def _command(argv):
    torch.set_num_threads(1)
    sys.exit(main(argv))


def _on_rank(rank, folder, argv):
    assert main(argv) == 0


def wait_for_steps(run, steps):
    until = time.monotonic() + 60
    while steps_recorded(run) < steps and time.monotonic() < until:
        time.sleep(0.01)


def course(run):
    """The records of all steps, without time and memory."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not MEASURED.search(name)} for record in records]


def tensors(checkpoint):
    with opened(checkpoint) as parts:
        return {name: tensor[...] for part in parts for name, tensor in part.items()}


@pytest.mark.slow
@pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")
def test_all_ranks_stop_after_one_step_and_the_resumed_run_is_the_undisturbed_one(corpus, tmp_path):
    (tmp_path / "texts").mkdir()
    for file in range(2):
        write_jsonl(tmp_path / "texts" / f"{file}.jsonl", make_texts(40, seed=file))
    data = ["--data", str(tmp_path / "texts"), "--stream", "--tokenizer", str(corpus / "tokenizer")]
    common = ["--steps", str(STEPS), "--mesh", "fsdp=2,ep=2", "--prompt", "a" * 20, "--checkpoint.every", "7",
              "--seq-len", "16"]  # fmt: skip
    command = ["train", *data, *FLAGS, *common]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    process = forked.context().Process(target=_torchrun, args=([*command, "--out", str(stopped)],))
    process.start()
    wait_for_steps(stopped, 3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(GRACE)
    assert process.exitcode == 1  # torchrun's own; those of the ranks are in the log
    said = [
        re.fullmatch(r"\S+ rank (\d) of 2, step (\d+): (.*)", line)
        for line in (stopped / "ranks.log").read_text().splitlines()
    ]
    assert sorted(line[1] for line in said) == ["0", "1"]
    assert {line[3] for line in said} == {"stopped by signal 15, saved; exit code 143"}
    (step,) = {int(line[2]) for line in said}
    assert 3 <= step < STEPS
    newest = list_checkpoints(stopped / "checkpoints")[-1]
    assert newest.name == f"step-{step:08}"
    verify(newest)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run_ranks(_on_rank, tmp_path / "a", ["train", "--out", str(stopped), "--resume", "--mesh", "fsdp=2,ep=2"])
    run_ranks(_on_rank, tmp_path / "b", [*command, "--out", str(whole)])
    assert course(stopped) == course(whole)
    ours, expected = (tensors(list_checkpoints(run / "checkpoints")[-1]) for run in (stopped, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_in_one_line_and_in_the_log(killed, corpus, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    command = ["train", "--data", str(corpus), *FLAGS, "--steps", "4000", "--mesh", "fsdp=2", "--out", str(run)]
    process = forked.context().Process(target=_torchrun_into, args=(said, command))
    process.start()
    wait_for_steps(run, 3)
    ranks = sorted(child.pid for child in psutil.Process(process.pid).children())
    os.kill(ranks[killed], signal.SIGKILL)
    process.join(GRACE)
    assert process.exitcode == 1
    (line,) = [line for line in said.read_text().splitlines() if line.startswith("remoe: error:")]
    assert re.search(rf"step \d+: \w+ failed: rank {killed} has ended; continue with --resume$", line)
    assert re.search(rf"rank {1 - killed} of 2, step \d+: \w+ failed: rank {killed} has ended", (run / LOG).read_text())
