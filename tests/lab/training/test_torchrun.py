"""Under torchrun: ranks that are killed, stopped by SIGTERM as by schedulers, or hang.

The ranks that are killed or stopped read a stream, so its place in a checkpoint of two ranks is tested too.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import forked
import psutil
import pytest
import torch
import torch.distributed as dist
import transformers
from packaging import version
from ranks import run_ranks, timeouts
from small_data import make_texts, write_jsonl
from tiny_run import FLAGS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from whole_run import steps_recorded

from remoe.lab.cli.main import main
from remoe.lab.data import StreamBatches
from remoe.lab.training import faults
from remoe.lab.training.checkpoint import list_checkpoints, verify
from remoe.lab.training.shards import opened
from remoe.lab.training.trainer import Trainer
from remoe.lab.training.words import LOG

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")]
GRACE = 30  # seconds that torchrun gives its processes
PATIENCE = 120  # seconds, for a busy machine
STEPS = 16
MEASURED = re.compile("per_second|share|memory")
CHANCE = random.Random(3)
# For each attempt: the rank that is killed, the step in which a clock begins to run, and the seconds on it.
KILLS = [(rank, CHANCE.randint(*steps), CHANCE.uniform(0, 0.2)) for rank, steps in enumerate(((3, 8), (9, 13)))]
MANY = 400  # seconds: a --mesh-timeout that is none of the defaults


def _torchrun(function, *arguments, restarts=0):
    """torchrun's agent, with functions in place of commands, which would import everything anew."""
    endpoint = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "test"}
    config = LaunchConfig(1, 1, 2, start_method="fork", max_restarts=restarts, monitor_interval=0.1, **endpoint)
    elastic_launch(config, function)(*arguments)


def _torchrun_into(path, function, *arguments, **options):
    """The same, with what goes to standard error in a file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    _torchrun(function, *arguments, **options)


def _command(argv):
    torch.set_num_threads(1)
    sys.exit(main(argv))


def _recording(records, kills, argv):
    """The same, on a rank that records the rows that it reads in a file, and is perhaps killed."""
    rank, attempt = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    killed, last, seconds = kills[attempt] if attempt < len(kills) else (None, 0, 0)
    clock = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    read = StreamBatches.batch

    def batch(batches, step, rows=None):
        token_BS = read(batches, step, rows)
        with (records / f"{attempt}-{rank}").open("a") as file:
            file.write(json.dumps([step, dict(zip(rows, token_BS.tolist(), strict=True))]) + "\n")
        if rank == killed and step >= last and not clock.ident:
            clock.start()
        elif rank == killed and step > last + 2:
            clock.join()  # the run must not end before it
            time.sleep(GRACE)
        return token_BS

    StreamBatches.batch = batch
    _command(argv)


def rows_read(records):
    """The rows of each step in its last execution, in which no two ranks may have read the same one."""
    found = {}
    for path in sorted(records.iterdir()):
        attempt, _ = path.name.split("-")
        for step, rows in map(json.loads, path.read_text().splitlines()):
            of_attempts = found.setdefault(step, {})
            of_step = of_attempts.setdefault(attempt, {})
            assert not of_step.keys() & rows.keys()
            of_step |= rows
    return {step: of_attempts[max(of_attempts)] for step, of_attempts in found.items()}


def _hanging(argv):
    """A command whose rank 1 hangs in step 3, until rank 0 has said so."""
    run = Path(argv[argv.index("--out") + 1])
    faults._PATIENCE[True] = 1.0
    train_step = Trainer._train_step

    def step(trainer, progress):
        if trainer.step == 2:
            assert timeouts() == {MANY}
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
            trainer.ranks.timeout = 2
            while trainer.ranks.rank == 1 and "failed: rank 1" not in read_text(run / LOG):
                time.sleep(0.1)
        return train_step(trainer, progress)

    Trainer._train_step = step
    _command(argv)


def read_text(path):
    return path.read_text() if path.exists() else ""


def _on_rank(rank, folder, function, *arguments):
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    assert end.value.code == 0


def wait_for_steps(run, steps):
    until = time.monotonic() + PATIENCE
    while steps_recorded(run) < steps and time.monotonic() < until:
        time.sleep(0.01)


def course(run):
    """The records of all steps, without time and memory."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not MEASURED.search(name)} for record in records]


def tensors(checkpoint):
    with opened(checkpoint) as parts:
        return {name: tensor[...] for part in parts for name, tensor in part.items()}


@pytest.fixture(scope="module")
def streaming(corpus, tmp_path_factory):
    """A command that trains on a stream with two ranks, and the folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("streaming")
    for name in ("texts", "ranks", "records"):
        (folder / name).mkdir()
    for file in range(2):
        write_jsonl(folder / "texts" / f"{file}.jsonl", make_texts(40, seed=file))
    data = ["--data", str(folder / "texts"), "--stream", "--tokenizer", str(corpus / "tokenizer")]
    common = ["--steps", str(STEPS), "--mesh", "fsdp=2,ep=2", "--prompt", "a" * 20, "--checkpoint.every", "7",
              "--seq-len", "16"]  # fmt: skip
    command = ["train", *data, *FLAGS, *common]
    run_ranks(_on_rank, folder / "ranks", _recording, folder / "records", [], [*command, "--out", str(folder / "run")])
    return command, folder


def check_same_run(run, whole):
    assert course(run) == course(whole)
    ours, expected = (tensors(list_checkpoints(folder / "checkpoints")[-1]) for folder in (run, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_all_ranks_stop_after_one_step_and_the_resumed_run_is_the_undisturbed_one(streaming, tmp_path):
    command, folder = streaming
    stopped = tmp_path / "stopped"
    process = forked.context().Process(target=_torchrun, args=(_command, [*command, "--out", str(stopped)]))
    process.start()
    wait_for_steps(stopped, 3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(GRACE)
    assert process.exitcode == 1  # torchrun's own; those of the ranks are in the log
    said = [
        re.fullmatch(r"\S+ rank (\d) of 2, step (\d+): (.*)", line) for line in (stopped / LOG).read_text().splitlines()
    ]
    assert sorted(line[1] for line in said) == ["0", "1"]
    assert {line[3] for line in said} == {"stopped by signal 15, saved; exit code 143"}
    (step,) = {int(line[2]) for line in said}
    assert 3 <= step < STEPS
    newest = list_checkpoints(stopped / "checkpoints")[-1]
    assert newest.name == f"step-{step:08}"
    verify(newest)
    run_ranks(_on_rank, tmp_path, _command, ["train", "--out", str(stopped), "--resume", "--mesh", "fsdp=2,ep=2"])
    check_same_run(stopped, folder / "run")


def test_a_run_whose_ranks_are_killed_is_the_undisturbed_one_and_names_them(streaming, tmp_path):
    command, folder = streaming
    run, records = tmp_path / "run", tmp_path / "records"
    records.mkdir()
    arguments = (tmp_path / "said", _recording, records, KILLS, [*command, "--out", str(run)])
    process = forked.context().Process(target=_torchrun_into, args=arguments, kwargs={"restarts": 3})
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    lines = [r"step \d+: \w+ failed: rank 0 has ended", r"step \d+: \w+ failed: rank 1 has ended"]
    check_said((tmp_path / "said").read_text(), (run / LOG).read_text(), lines)
    attempts = {path.name.split("-")[0] for path in records.iterdir()}
    assert attempts == {"0", "1", "2"}
    read = rows_read(records)
    assert read == rows_read(folder / "records")
    assert sorted(read) == list(range(STEPS))
    assert all(len(rows) == 4 for rows in read.values())
    check_same_run(run, folder / "run")


def check_said(said, log, lines):
    """What was printed has these lines, one for each fault in turn, of the ranks that wait; so does the log."""
    found = [text for text in said.splitlines() if text.startswith("remoe: error:")]
    for text, line in zip(found, lines, strict=True):
        assert re.search(f"{line}; continue with --resume$", text)
        assert re.search(f"rank {0 if 'rank 1' in line else 1} of 2, {line}", log)


HANGS = r"step 3: all_gather\w* failed: rank 1 did not take part within 2 s \(--mesh-timeout\)"


@pytest.mark.parametrize(
    ("fault", "line"),
    [(0, r"step \d+: \w+ failed: rank 0 has ended"), ("hangs", HANGS)],
    ids=["rank 0 is killed", "rank 1 hangs"],
)
def test_without_restarts_the_rank_at_fault_is_named_and_torchrun_fails(fault, line, corpus, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    command = ["train", "--data", str(corpus), *FLAGS, "--steps", "4000", "--mesh", "fsdp=2,ep=2", "--out", str(run)]
    command += ["--mesh-timeout", str(MANY)]
    function = _hanging if fault == "hangs" else _command
    process = forked.context().Process(target=_torchrun_into, args=(said, function, command))
    process.start()
    if fault != "hangs":
        wait_for_steps(run, 3)
        ranks = sorted(child.pid for child in psutil.Process(process.pid).children())
        os.kill(ranks[fault], signal.SIGKILL)
    process.join(PATIENCE)
    assert process.exitcode == 1
    check_said(said.read_text(), (run / LOG).read_text(), [line])
