"""A rank that hangs, ends or fails: one rank says so in one line, and each leaves its last words."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from remoe.errors import ConfigError, DataError, RemoeError
from remoe.lab.training import faults
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.faults import last_words
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.train import run_training
from remoe.lab.training.words import LOG

pytestmark = pytest.mark.slow


def _end(rank, folder, fault):
    """Rank 1 has a fault at step 7, while the others wait for it; all leave what they raised in a file."""
    ranks = Ranks(Mesh(fsdp=3), "cpu", timeout=2)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=ranks.timeout))
    faults._PATIENCE[True] = 1.0  # all ranks of this test begin to wait at the same time
    ranks.wait()
    ranks.begin_step(0, 7)
    try:
        with last_words(ranks, folder):
            if rank == 1:
                fault(ranks, folder)
            ranks.check_equal([torch.ones(1)], "nothing")
    except BaseException as error:
        (folder / f"raised-{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # no collective can end this


def hang(ranks, folder):
    while len(raised(folder)) < 2:  # until the others have noticed
        time.sleep(0.1)
    os._exit(0)


def die(ranks, folder):
    os._exit(0)


def fail(ranks, folder):
    raise DataError("a shard is missing")


def _agree(rank, folder, failing):
    """Ranks that fail while all of them agree on it."""
    ranks = Ranks(Mesh(fsdp=3), "cpu")
    try:
        with last_words(ranks, folder), ranks.together():
            if rank in failing:
                raise DataError("a shard is missing")
    except BaseException as error:
        (folder / f"raised-{rank}").write_text(f"{type(error).__name__}: {error}")
    ranks.wait()


def _begin(rank, folder):
    """A new run where an older one is."""
    config = config_from_dict({"mesh": "fsdp=2", "batch_size": 8, "micro_batch_size": 2, "device": "cpu"}, "test")
    with pytest.raises((ConfigError, SystemExit)) as error:
        run_training(config, RunFolder(folder / "run"), None)
    (folder / f"raised-{rank}").write_text(f"{error.type.__name__}: {error.value}")


def raised(folder):
    return {rank: path.read_text() for rank in range(3) if (path := folder / f"raised-{rank}").exists()}


@pytest.mark.parametrize(
    ("fault", "line", "words"),
    [
        (hang, "step 7: all_gather failed: rank 1 did not take part within 2 s (--mesh-timeout)", "no answer in 2 s"),
        (die, "step 7: all_gather failed: rank 1 has ended", "lost contact with another rank"),
    ],
)
def test_the_lowest_rank_that_waits_names_the_one_that_is_missing(tmp_path, fault, line, words):
    run_ranks(_end, tmp_path, fault, world_size=3)
    assert raised(tmp_path) == {0: f"{RemoeError.__name__}: {line}; continue with --resume", 2: "SystemExit: 2"}
    log = (tmp_path / LOG).read_text().splitlines()
    assert sorted(entry.split(" ", 1)[1] for entry in log) == [
        f"rank 0 of 3, {line}; continue with --resume",
        *(f"rank {rank} of 3, step 7: waited in all_gather: {words}" for rank in (0, 2)),
    ]


def test_ranks_that_wait_for_one_that_failed_leave_the_word_to_it(tmp_path):
    run_ranks(_end, tmp_path, fail, world_size=3)
    assert raised(tmp_path) == {0: "SystemExit: 2", 1: "DataError: a shard is missing", 2: "SystemExit: 2"}
    assert "rank 1 of 3, step 7: a shard is missing" in (tmp_path / LOG).read_text()


@pytest.mark.parametrize("failing", [(1,), (0, 1, 2)])
def test_a_failure_that_all_ranks_agree_on_is_printed_once(tmp_path, failing):
    run_ranks(_agree, tmp_path, failing, world_size=3)
    expected = dict.fromkeys(range(3), "SystemExit: 2") | {failing[0]: "DataError: a shard is missing"}
    assert raised(tmp_path) == expected
    words = "a shard is missing" if 2 in failing else "rank 2 stops because rank 1 failed"
    assert f"rank 2 of 3, step 0: {words}" in (tmp_path / LOG).read_text()


def test_a_run_that_is_refused_writes_nothing_into_the_older_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")
    run_ranks(_begin, tmp_path)
    assert "ConfigError: " in raised(tmp_path)[0]
    assert "already holds a run" in raised(tmp_path)[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
