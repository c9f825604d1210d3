"""Runs what is missing, one `remoe train` after the other, each in a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch
import yaml

from remoe.compare.budget import matches
from remoe.compare.experiment import Experiment, Run
from remoe.compare.live import Live
from remoe.compare.pool import Pool
from remoe.data import Dataset
from remoe.errors import ConfigError, RemoeError
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.training.interrupt import Interrupt
from remoe.training.trainer import model_config

POLL_SECONDS = 1.0


def known_runs(experiment: Experiment, pool: Pool) -> list[Run]:
    """All runs in the order in which they are made: at equal tokens, then at equal FLOPs as far as they are known."""
    runs = experiment.runs + [match.run for match in matches(experiment, pool.summary) if match.run]
    return list(dict.fromkeys(runs))


def check_models(experiment: Experiment, dataset: Dataset) -> None:
    """Finds, before hours of training, the runs whose model cannot be built.

    Raises:
        ConfigError: naming the run.
    """
    for run in experiment.runs:
        try:
            with torch.device("meta"):
                RemoeForCausalLM(model_config(run.config, dataset))
        except ConfigError as error:
            raise ConfigError(f"{run.label}: {error}") from error


def train_missing(experiment: Experiment, pool: Pool, dataset: Dataset, device: str, live: Live) -> bool:
    """Trains every run that is not finished; several processes may share the work on one pool.

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
    tried: set[str] = set()
    record_finished(experiment, pool, dataset, device, live)
    with Interrupt() as interrupt:
        while run := _next(experiment, pool, tried):
            name = pool.name(run)
            with pool.claimed(run) as log:
                if log is None or pool.summary(run) is not None:  # another process has it, or has just finished it
                    tried.add(name)
                    continue
                live.started(run)
                code = _train(run, pool, dataset.path, device, log, interrupt, live)
            if interrupt.received:
                live.stopped(run)
                return False
            if pool.summary(run) is None:
                tried.add(name)
                live.failed(run, _last_line(pool.log_file(run)) or f"exit code {code}")
            else:
                live.finished(run)
                record_finished(experiment, pool, dataset, device, live)
    return True


def record_finished(experiment: Experiment, pool: Pool, dataset: Dataset, device: str, live: Live) -> None:
    """Makes the record of every finished run that has none: whoever trained it may have been stopped before."""
    for run in known_runs(experiment, pool):
        if pool.summary(run) is not None and not pool.record_file(run).exists():
            try:
                pool.record(run, dataset, device)
            except RemoeError as error:
                live.failed(run, f"no record: {error}")


def _next(experiment: Experiment, pool: Pool, tried: set[str]) -> Run | None:
    missing = (run for run in known_runs(experiment, pool) if pool.state(run) != "finished")
    return next((run for run in missing if pool.name(run) not in tried), None)


def _train(run: Run, pool: Pool, data: Path, device: str, log: IO[bytes], interrupt: Interrupt, live: Live) -> int:
    options = pool.options_file(run)
    options.write_text(yaml.safe_dump(run.options, sort_keys=False))
    folder = pool.folder(run)
    how = ["--resume"] if folder.config.exists() else ["--config", str(options)]
    where = ["--data", str(data), "--out", str(folder.path), "--device", device]
    command = [sys.executable, "-m", "remoe.cli.main", "train", *how, *where]
    # In a session of its own, so that Ctrl-C reaches the child once: from here.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    asked = False
    while child.poll() is None:
        if interrupt.received and not asked:
            child.send_signal(signal.SIGINT)
            asked = True
        live.show(run)
        time.sleep(POLL_SECONDS)
    return child.returncode


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
