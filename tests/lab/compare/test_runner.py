"""Workers of a comparison: signals, what became of a child, and what they must not do at the same time."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from finished_run import EXPERIMENT, finish, whole

from remoe.errors import ConfigError, DataError
from remoe.lab.compare import runner as module
from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.live import Live
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.runner import Worker, _Matrix, _why, check_device, check_models, train_missing
from remoe.lab.compare.starter import Starter

WORKERS = [Worker("cpu", 1)] * 2


@pytest.fixture
def two(pool, monkeypatch):
    """An experiment of two runs, and its pool, whose records are made of nothing."""
    monkeypatch.setattr(Pool, "record", lambda pool, run, *_: pool._save(run, whole(pool, run)))
    monkeypatch.setattr("remoe.lab.compare.runner.POLL_SECONDS", 0.02)
    runs = {"seeds": [0], "variants": {"relu": {}, "topk": {"router": "topk"}}, "equal_flops": False}
    return experiment_from_dict(EXPERIMENT | runs, "trial", "trial.yaml"), pool


def test_a_run_that_finishes_in_spite_of_a_signal_is_finished_whoever_waits_for_it(two, monkeypatch, capsys):
    experiment, pool = two
    first, second = experiment.runs
    finish(pool, second, 4.0, 1.0)
    pool._save(second, whole(pool, second))
    interrupt = SimpleNamespace(received=None)
    matrix = _Matrix(experiment, pool, None, Live(experiment, pool, 2), interrupt, Starter())

    def train(matrix, run, worker, lock):
        time.sleep(0.2)  # the other worker has found that only this run is left
        interrupt.received = signal.SIGINT
        time.sleep(0.2)
        finish(pool, run, 4.0, 1.0)
        return 0

    monkeypatch.setattr(_Matrix, "_train", train)
    with ThreadPoolExecutor(2) as executor:
        ended = [executor.submit(matrix.work, worker) for worker in WORKERS]
    assert [future.result() for future in ended] == [False, False]
    assert pool.recorded(first)
    out = capsys.readouterr().out
    assert f"{first.label}: validation loss 4.0000" in out
    assert "stopped" not in out


def test_models_are_evaluated_one_after_the_other(two, monkeypatch):
    """The harness keeps in a task what it asks of one model."""
    experiment, pool = two
    for run in experiment.runs:
        finish(pool, run, 4.0, 1.0)
    inside, evaluated = threading.Lock(), []

    def add_tasks(pool, run, device, stop):
        assert inside.acquire(blocking=False)
        time.sleep(0.1)
        evaluated.append(run.label)
        inside.release()

    monkeypatch.setattr(Pool, "add_tasks", add_tasks)
    assert train_missing(experiment, pool, None, WORKERS, Live(experiment, pool, 2)) is None
    assert sorted(evaluated) == sorted(run.label for run in experiment.runs)


def test_a_task_that_fails_leaves_the_record(two, monkeypatch):
    def add_tasks(*_, **__):
        raise DataError("task piqa: no file")

    experiment, pool = two
    failed = []
    for run in experiment.runs:
        finish(pool, run, 4.0, 1.0)
    live = Live(experiment, pool)
    monkeypatch.setattr(live, "failed", lambda run, why: failed.append(why))
    monkeypatch.setattr(Pool, "add_tasks", add_tasks)
    train_missing(experiment, pool, None, WORKERS[:1], live)
    assert failed == ["some tasks are missing: task piqa: no file"] * 2
    assert all(pool.record_file(run).exists() for run in experiment.runs)


def test_why_a_child_ended(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("continue with: remoe train --resume\n")
    assert _why(-signal.SIGKILL, log, 0) == "killed by SIGKILL (out of memory?)"
    assert _why(-signal.SIGSEGV, log, 0) == "killed by SIGSEGV"
    assert _why(-signal.SIGRTMIN - 1, log, 0) == f"killed by signal {signal.SIGRTMIN + 1}"
    assert _why(2, log, log.stat().st_size) == "exit code 2"  # what stands there is another child's
    assert _why(2, log, 0) == "continue with: remoe train --resume"


def test_a_finished_run_may_have_been_trained_where_its_experts_run(two):
    variants = {"variants": {"relu": {"model": {"experts_backend": "triton"}}, "topk": {"router": "topk"}}}
    elsewhere = experiment_from_dict(EXPERIMENT | variants | {"seeds": [0]}, "trial", "trial.yaml")
    _, pool = two
    with pytest.raises(ConfigError, match="triton"):
        check_device(elsewhere, pool, torch.device("cpu"))
    finish(pool, elsewhere.runs[0], 4.0, 1.0)
    pool.record(elsewhere.runs[0])
    check_device(elsewhere, pool, torch.device("cpu"))


def test_each_model_is_built_once(monkeypatch):
    built = []
    monkeypatch.setattr(module, "model_without_values", lambda config: built.append((config.router, config.k)))
    axes = {"optim.lr": [0.001, 0.002], "batch_size": [16, 32], "k": [1, 2]}
    given = {"variants": {"relu": {}, "topk": {"router": "topk"}}, "seeds": [0, 1], "axes": axes}
    check_models(experiment_from_dict(given, "x", "x"))
    assert sorted(built) == [("relu", 1), ("relu", 2), ("topk", 1), ("topk", 2)]
