"""Runs what is missing, one `remoe train` after the other, each in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import yaml

from remoe.compare.budget import matches
from remoe.compare.experiment import Experiment, Run
from remoe.compare.live import Live
from remoe.compare.pool import Pool
from remoe.data import Dataset
from remoe.errors import ConfigError, RemoeError
from remoe.training.interrupt import Interrupt
from remoe.training.trainer import check_model

POLL_SECONDS = 1.0


def known_runs(experiment: Experiment, pool: Pool) -> list[Run]:
    """All runs in the order in which they are made: at equal tokens, then at equal FLOPs as far as they are known."""
    runs = experiment.runs + [match.run for match in matches(experiment, pool) if match.run]
    unique: dict[str, Run] = {}
    for run in runs:
        unique.setdefault(run.key, run)
    return list(unique.values())


def check_models(experiment: Experiment) -> None:
    """Finds, before hours of training, the runs whose model cannot be built.

    Raises:
        ConfigError: naming the run.
    """
    for run in experiment.runs:
        try:
            check_model(run.config)
        except ConfigError as error:
            raise ConfigError(f"{run.label}: {error}") from error


def train_missing(experiment: Experiment, pool: Pool, dataset: Dataset, device: str, live: Live) -> bool:
    """Trains every run that is not finished, and makes the records of those that are.

    Several processes may share the work on one pool: each takes what no other has, and waits for the others' runs
    where there is nothing else to do, because further runs may follow from them.
    A run that fails is left as it is, and the others go on.

    Args:
        experiment: what to run.
        pool: where runs lie.
        dataset: what they are trained on.
        device: `--device` of `remoe train`.
        live: shows how far everything is.

    Returns:
        False when a signal stopped the work; the run in progress has saved its state.
    """
    pool.path.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()  # keys
    with Interrupt() as interrupt:
        while todo := [run for run in known_runs(experiment, pool) if run.key not in failed and not pool.recorded(run)]:
            for run in todo:
                with pool.claimed(run) as lock:
                    if lock is None or pool.recorded(run):  # another process has it, or has just finished it
                        continue
                    if error := _finish(run, pool, dataset, device, lock, interrupt, live):
                        failed.add(run.key)
                        live.failed(run, error)
                break
            else:
                live.wait(run)
                time.sleep(POLL_SECONDS)
            if interrupt.received:
                live.stopped(run)
                return False
    return True


def _finish(
    run: Run, pool: Pool, dataset: Dataset, device: str, lock: IO[bytes], interrupt: Interrupt, live: Live
) -> str | None:
    """Trains a run where it is not finished, and makes its record; says why where that fails."""
    if pool.state(run) != "finished":
        live.started(run)
        code = _train(run, pool, dataset.path, device, lock, interrupt, live)
        if pool.summary(run) is None:
            return None if interrupt.received else _last_line(pool.log_file(run)) or f"exit code {code}"
        live.finished(run)
    try:
        pool.record(run, dataset, device)
    except RemoeError as error:
        return f"no record: {error}"
    return None


def _train(run: Run, pool: Pool, data: Path, device: str, lock: IO[bytes], interrupt: Interrupt, live: Live) -> int:
    options = pool.options_file(run)
    options.write_text(yaml.safe_dump(run.options, sort_keys=False))
    folder = pool.folder(run)
    how = ["--resume"] if folder.config.exists() else ["--config", str(options)]
    where = ["--data", str(data), "--out", str(folder.path), "--device", device]
    command = [sys.executable, "-m", "remoe.cli.main", "train", *how, *where]
    with pool.log_file(run).open("ab") as log:
        # In a session of its own, so that Ctrl-C reaches the child once: from here. It holds the lock too.
        posix = {"start_new_session": True, "pass_fds": [lock.fileno()]} if os.name == "posix" else {}
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **posix)
    asked = False
    try:
        while child.poll() is None:
            if interrupt.received and not asked:
                child.send_signal(signal.SIGINT)
                asked = True
            live.show(run)
            time.sleep(POLL_SECONDS)
    finally:  # a second Ctrl-C, or a terminal that is gone: no child trains on unseen
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.wait()
    return child.returncode


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
