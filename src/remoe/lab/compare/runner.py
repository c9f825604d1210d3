"""Trains the missing runs; each worker has one `remoe train` at a time, in a process of its own."""

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO

import torch

from remoe.errors import ConfigError, RemoeError
from remoe.lab.compare.budget import known_runs
from remoe.lab.compare.experiment import Experiment, RunSpec
from remoe.lab.compare.live import Live
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.starter import Starter
from remoe.lab.data import Dataset
from remoe.lab.files import atomic_write
from remoe.lab.training.build import experts_backend, model_without_values
from remoe.lab.training.interrupt import Interrupt
from remoe.lab.training.yaml_files import to_yaml

POLL_SECONDS = 1.0


def check_models(experiment: Experiment) -> None:
    """Checks, before data are prepared, that every run's model can be built.

    Raises:
        ConfigError: naming the run.
    """
    for run in _one_of_each_model(experiment.runs):
        with _named(run):
            model_without_values(run.config)


def check_device(experiment: Experiment, pool: Pool, device: torch.device) -> None:
    """Checks, before any training, that every unfinished run can be trained on `device`.

    Raises:
        ConfigError: naming the run.
    """
    for run in _one_of_each_model(run for run in experiment.runs if not pool.recorded(run)):
        with _named(run):
            experts_backend(model_without_values(run.config).config, run.config.dtype, device)


def _one_of_each_model(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """The first of the runs whose models differ in nothing: a model takes much longer to build than to compare."""
    found: dict[str, RunSpec] = {}
    for run in runs:
        options = run.config.to_dict()
        others = {"seed", "steps", "optim", "validate", "checkpoint", "batch_size", "micro_batch_size"}
        found.setdefault(json.dumps({name: options[name] for name in options.keys() - others}, sort_keys=True), run)
    return list(found.values())


@contextmanager
def _named(run: RunSpec) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{run.label}: {error}") from error


@dataclass(frozen=True)
class Worker:
    """One of the workers that train at the same time: its device and its number of CPU threads."""

    device: str
    threads: int


def workers_on(device: str, count: int) -> list[Worker]:
    """Workers that share this process's threads evenly; several workers share all GPUs unless `device` names one."""
    threads = max(1, torch.get_num_threads() // count)
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and count > 1 else 0
    return [Worker(f"cuda:{number % gpus}" if gpus else device, threads) for number in range(count)]


def train_missing(
    experiment: Experiment, pool: Pool, dataset: Dataset, workers: Sequence[Worker], live: Live
) -> int | None:
    """Trains all unfinished runs and makes the missing records.

    Workers, including those of other processes, may share one pool: each takes a run that no other has. A worker
    without a run waits for the others, because their results may ask for further runs. If a run fails, the others
    continue.

    Args:
        experiment: the experiment.
        pool: its runs.
        dataset: the data.
        workers: each trains one run at a time.
        live: shows the progress.

    Returns:
        The signal that stopped the work, or None; runs in progress have saved their state.
    """
    pool.path.mkdir(parents=True, exist_ok=True)
    with Interrupt() as interrupt, Starter() as starter, ThreadPoolExecutor(len(workers)) as executor:
        matrix = _Matrix(experiment, pool, dataset, live, interrupt, starter)
        futures = [executor.submit(matrix.work, worker) for worker in workers]
        try:
            while (state := wait(futures, POLL_SECONDS, FIRST_EXCEPTION)).not_done:
                if interrupt.received:
                    live.stopping()
                for future in state.done:
                    future.result()
            return None if all(future.result() for future in futures) else interrupt.received
        except BaseException:  # a worker's error or a second Ctrl-C: stop the others
            matrix.broken = True
            raise


@dataclass
class _Matrix:
    """The state that the workers of a process share."""

    experiment: Experiment
    pool: Pool
    dataset: Dataset
    live: Live
    interrupt: Interrupt
    starter: Starter
    evaluating: Lock = field(default_factory=Lock)  # the harness stores one model's requests in the task
    failed: set[str] = field(default_factory=set)  # keys
    claimed: set[str] = field(default_factory=set)
    broken: bool = False

    @property
    def signals(self) -> int:
        """The number of signals to send to runs in progress: after one they save their state, after two they exit."""
        return bool(self.interrupt.received) + self.broken

    def work(self, worker: Worker) -> bool:
        """Trains runs until none is left; returns False if a signal stopped it."""
        torch.set_num_threads(worker.threads)  # for the records, which this thread makes
        while todo := [run for run in known_runs(self.experiment, self.pool) if self._unfinished(run)]:
            for run in todo:
                with self.pool.claimed(run) as lock:
                    if lock is None or not self._unfinished(run):  # another worker has it or has just finished it
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

    def _unfinished(self, run: RunSpec) -> bool:
        return run.key not in self.failed and not self.pool.recorded(run)

    def _finish(self, run: RunSpec, worker: Worker, lock: IO[bytes]) -> str | None:
        """Trains a run unless it is finished, and makes its record; returns the reason if that fails."""
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
                missing = "some tasks are missing"
                self.pool.add_tasks(run, worker.device, stop=lambda: self.signals > 0)
        except RemoeError as error:
            return f"{missing}: {error}"
        return None

    def _train(self, run: RunSpec, worker: Worker, lock: IO[bytes]) -> int:
        options = self.pool.options_file(run)
        atomic_write(options, to_yaml(run.options).encode())
        folder = self.pool.folder(run)
        how = ["--resume"] if folder.config.exists() else ["--config", str(options)]
        where = ["--data", str(self.dataset.path), "--out", str(folder.path), "--device", worker.device]
        environment = {**os.environ, "OMP_NUM_THREADS": str(worker.threads)}
        with self.pool.log_file(run).open("ab") as log:
            # It also holds the lock, so that no other process takes the run if this one is killed.
            child = self.starter.start(
                ["train", *how, *where],
                environment,
                stdout=log.fileno(),
                stderr=log.fileno(),
                keep_open=[lock.fileno()] if os.name == "posix" else [],
            )
        sent = 0
        try:
            while child.poll() is None:
                if sent < self.signals:
                    child.send_signal(signal.SIGINT)
                    sent += 1
                self.live.show()
                time.sleep(POLL_SECONDS)
        finally:  # after an error, such as a closed terminal, no child continues unseen
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                child.wait()
        return child.returncode


def _why(code: int, log: Path, start: int) -> str:
    """Why a child ended: a signal, otherwise the last line in its log after the first `start` bytes."""
    if code < 0:
        names = {known.value: known.name for known in signal.Signals}  # real-time signals have none
        return f"killed by {names.get(-code, f'signal {-code}')}" + (
            " (out of memory?)" if code == -signal.SIGKILL else ""
        )
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
