"""Runs what is missing, a `remoe train` for each worker, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO

import torch

from remoe.errors import ConfigError, RemoeError
from remoe.lab.compare.budget import matches
from remoe.lab.compare.experiment import Experiment, Run
from remoe.lab.compare.live import Live
from remoe.lab.compare.pool import Pool
from remoe.lab.data import Dataset
from remoe.lab.training.build import experts_backend, model_without_values
from remoe.lab.training.interrupt import Interrupt
from remoe.lab.training.yaml_files import to_yaml

POLL_SECONDS = 1.0


def known_runs(experiment: Experiment, pool: Pool) -> list[Run]:
    """All runs in the order in which they are made: at equal tokens, then at equal FLOPs as far as they are known."""
    runs = experiment.runs + [match.run for match in matches(experiment, pool) if match.run]
    unique: dict[str, Run] = {}
    for run in runs:
        unique.setdefault(run.key, run)
    return list(unique.values())


def check_models(experiment: Experiment) -> None:
    """Finds, before data are prepared, the runs whose model cannot be built.

    Raises:
        ConfigError: naming the run.
    """
    for run in experiment.runs:
        with _named(run):
            model_without_values(run.config)


def check_device(experiment: Experiment, pool: Pool, device: torch.device) -> None:
    """Finds, before hours of training, the runs that cannot be trained on `device`; finished ones need not be.

    Raises:
        ConfigError: naming the run.
    """
    for run in experiment.runs:
        if not pool.recorded(run):
            with _named(run):
                experts_backend(model_without_values(run.config), run.config.dtype, device)


@contextmanager
def _named(run: Run) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{run.label}: {error}") from error


@dataclass(frozen=True)
class Worker:
    """One of those who train at the same time: where, and on how many threads of the processor."""

    device: str
    threads: int


def workers_on(device: str, count: int) -> list[Worker]:
    """Workers that share this process's threads evenly, and several of them all GPUs where `device` names none."""
    threads = max(1, torch.get_num_threads() // count)
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and count > 1 else 0
    return [Worker(f"cuda:{number % gpus}" if gpus else device, threads) for number in range(count)]


def train_missing(
    experiment: Experiment, pool: Pool, dataset: Dataset, workers: Sequence[Worker], live: Live
) -> int | None:
    """Trains every run that is not finished, and makes the records of those that are.

    Workers, of several processes too, may share one pool: each takes what no other has, and waits for the others' runs
    where there is nothing else to do, because further runs may follow from them.
    A run that fails is left as it is, and the others go on.

    Args:
        experiment: what to run.
        pool: where runs lie.
        dataset: what they are trained on.
        workers: a run at a time each.
        live: shows how far everything is.

    Returns:
        The signal that stopped the work, where one did; the runs in progress have saved their state.
    """
    pool.path.mkdir(parents=True, exist_ok=True)
    with Interrupt() as interrupt, ThreadPoolExecutor(len(workers)) as executor:
        matrix = _Matrix(experiment, pool, dataset, live, interrupt)
        futures = [executor.submit(matrix.work, worker) for worker in workers]
        try:
            while (state := wait(futures, POLL_SECONDS, FIRST_EXCEPTION)).not_done:
                if interrupt.received:
                    live.stopping()
                for future in state.done:
                    future.result()
            return None if all(future.result() for future in futures) else interrupt.received
        except BaseException:  # a worker's error, or a second Ctrl-C: the others must not go on for hours
            matrix.broken = True
            raise


@dataclass
class _Matrix:
    """What the workers of a process share."""

    experiment: Experiment
    pool: Pool
    dataset: Dataset
    live: Live
    interrupt: Interrupt
    evaluating: Lock = field(default_factory=Lock)  # the harness keeps in a task what it asks of one model
    failed: set[str] = field(default_factory=set)  # keys
    claimed: set[str] = field(default_factory=set)
    broken: bool = False

    @property
    def signals(self) -> int:
        """How many signals runs in progress must have had: with the first they save their state, with two they end."""
        return bool(self.interrupt.received) + self.broken

    def work(self, worker: Worker) -> bool:
        """Trains runs until none is left; False when a signal stopped it."""
        torch.set_num_threads(worker.threads)  # of this thread, for the records
        while todo := [run for run in known_runs(self.experiment, self.pool) if self._unfinished(run)]:
            for run in todo:
                with self.pool.claimed(run) as lock:
                    if lock is None or not self._unfinished(run):  # another has it, or has just finished it
                        continue
                    self.claimed.add(run.key)
                    if error := self._finish(run, worker, lock):
                        self.failed.add(run.key)
                        self.live.failed(run, error)
                    self.claimed.remove(run.key)
                break
            else:
                if not self.claimed:
                    self.live.wait(run)
                time.sleep(POLL_SECONDS)
            if self.signals:
                return False
        return True

    def _unfinished(self, run: Run) -> bool:
        return run.key not in self.failed and not self.pool.recorded(run)

    def _finish(self, run: Run, worker: Worker, lock: IO[bytes]) -> str | None:
        """Trains a run where it is not finished, and makes its record; says why where that fails."""
        if self.pool.state(run) != "finished":
            self.live.started(run)
            before = self.pool.log_file(run).stat().st_size if self.pool.log_file(run).exists() else 0
            code = self._train(run, worker, lock)
            if self.pool.summary(run) is None:
                if self.signals:
                    self.live.stopped(run)
                    return None
                return _why(code, self.pool.log_file(run), before)
            self.live.finished(run)
        missing = "no record"
        try:
            with self.evaluating:
                self.pool.record(run, self.dataset, worker.device)
                missing = "not all tasks"
                self.pool.add_tasks(run, worker.device, stop=lambda: self.signals > 0)
        except RemoeError as error:
            return f"{missing}: {error}"
        return None

    def _train(self, run: Run, worker: Worker, lock: IO[bytes]) -> int:
        options = self.pool.options_file(run)
        options.write_text(to_yaml(run.options))
        folder = self.pool.folder(run)
        how = ["--resume"] if folder.config.exists() else ["--config", str(options)]
        where = ["--data", str(self.dataset.path), "--out", str(folder.path), "--device", worker.device]
        command = [sys.executable, "-m", "remoe.lab.cli.main", "train", *how, *where]
        environment = {**os.environ, "OMP_NUM_THREADS": str(worker.threads)}
        with self.pool.log_file(run).open("ab") as log:
            # In a session of its own, so that Ctrl-C reaches the child once: from here. It holds the lock too.
            posix = {"start_new_session": True, "pass_fds": [lock.fileno()]} if os.name == "posix" else {}
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **posix
            )
        sent = 0
        try:
            while child.poll() is None:
                if sent < self.signals:
                    child.send_signal(signal.SIGINT)
                    sent += 1
                self.live.show()
                time.sleep(POLL_SECONDS)
        finally:  # an error, such as a terminal that is gone: no child trains on unseen
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                child.wait()
        return child.returncode


def _why(code: int, log: Path, start: int) -> str:
    """Why a child ended: by a signal, or the last line that it wrote, behind `start` bytes of its log."""
    if code < 0:
        names = {known.value: known.name for known in signal.Signals}  # real-time signals have none
        return f"killed by {names.get(-code, f'signal {-code}')}" + (
            " (out of memory?)" if code == -signal.SIGKILL else ""
        )
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
