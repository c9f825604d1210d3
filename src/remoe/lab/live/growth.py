"""What a run has written so far, read piece by piece as it grows."""

import json
import math
import os
import shlex
import time
from statistics import median
from typing import Any

import numpy as np

from remoe.errors import RemoeError
from remoe.lab.console import duration
from remoe.lab.files import locked
from remoe.lab.text import short_name, visible
from remoe.lab.thinning import kept_points
from remoe.lab.training.folder import RunFolder
from remoe.routing import ROUTERS

COLUMNS = ("step", "lm_loss", "sparsity", "lambda", "tokens_per_second")
MOST_ROWS = 2000  # in one answer
RECENT = 20  # records from which the time left is estimated
QUIET_SECONDS = 10.0  # without a record, after which it is asked whether a process still trains the run


class Growth:
    """The records of a run, and whether it is being trained.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: when it is not a run.
        ConfigError: when its options cannot be read.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.config = run, run.load_config()
        self.epoch = time.time_ns() >> 20  # another than that of an earlier server, whose page may still be open
        self._file, self._read, self._moved, self._looked = 0, 0, -math.inf, False
        self._forget()

    def _forget(self) -> None:
        self.rows: list[list[float | None]] = []  # COLUMNS of each record
        self.validation: list[list[float]] = []  # step, loss
        self.load: list[list[float]] = []  # (L, E) of the last record
        self._read, self.epoch = 0, self.epoch + 1

    def look(self) -> None:
        """Reads what was added; begins anew when the file was replaced, as a resumed run does."""
        try:
            with self.run.metrics.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._read:
                    self._forget()
                    self._file = status.st_ino
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):  # is still being written
                        break
                    self._read += len(line)
                    self._add(line)
                    if self._looked:  # not what was there before
                        self._moved = time.monotonic()
        except FileNotFoundError:
            if self.rows:
                self._forget()
        self._looked = True

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            row = [_number(record.get(name)) for name in COLUMNS]
        except (ValueError, AttributeError, RecursionError):
            return  # a damaged line; the commands that need every record name it
        if row[0] is None:
            return
        self.rows.append(row)
        self.load = record.get("load_per_expert") or self.load
        validated = record.get("validation_loss")
        loss = _number(validated.get("all") if isinstance(validated, dict) else validated)
        if loss is not None:
            self.validation.append([row[0], loss])

    def answer(self, epoch: int, after: int) -> dict[str, Any]:
        """What a page needs that has the rows of `epoch` up to the step `after`, for JSON."""
        self.look()
        if epoch != self.epoch:
            after = 0
        config, routed = self.config, ROUTERS[self.config.router].routes_pairs
        state, words = self.state()
        return {
            "epoch": self.epoch,
            "name": short_name(self.run.path.resolve().name),
            "state": state,
            "words": [visible(sentence) for sentence in words],
            "steps": config.steps,
            "target": 1 - config.active_per_token / config.experts_per_layer if routed else None,
            "rows": thinned([row for row in self.rows if row[0] > after]),
            "validation": [pair for pair in self.validation if pair[0] > after],
            "load": self.load if routed else [],
        }

    def state(self) -> tuple[str, list[str]]:
        """One of training, finished, stopped and gone, and sentences about it."""
        path, steps = self.run.path, self.config.steps
        if not self.run.config.exists():
            return "gone", [f"{path} is not there any more: it was moved or deleted."]
        done = int(self.rows[-1][0]) if self.rows else 0
        summary = self.run.load_summary()
        if summary.get("steps", -1) >= max(done, steps):
            said = summary.get("outcome")
            sentences = [one for one in said if isinstance(one, str)] if isinstance(said, list) else []
            loss = f"validation loss {summary['validation_loss']:.4f}"
            return "finished", [f"Finished: {summary['steps']:,} steps, {loss}.", *sentences]
        if time.monotonic() - self._moved < QUIET_SECONDS or self._is_trained():
            if not done:
                return "training", ["Training: no step is recorded yet."]
            speeds = [row[-1] for row in self.rows[-RECENT:] if row[-1]]
            speed, step_tokens = median(speeds or [0]), self.config.batch_size * self.config.seq_len
            left = f", about {duration((steps - done) * step_tokens / speed)} left" if speed else ""
            return "training", [f"Training: step {done:,} of {steps:,}{left}."]
        again = f"remoe train --out {shlex.quote(str(path))} --resume"
        return "stopped", [f"Stopped at step {done:,} of {steps:,}: no process trains it. Continue with: {again}"]

    def _is_trained(self) -> bool:
        try:
            with locked(self.run.path, RemoeError()):
                return False
        except RemoeError:
            return True
        except OSError:
            return False


def thinned(rows: list[list[float | None]]) -> list[list[float | None]]:
    """At most about MOST_ROWS rows: those with the lowest and highest values of their columns, and the last."""
    if len(rows) <= MOST_ROWS:
        return rows
    values_NS = np.array([row[1:] for row in rows], np.float64).T  # None becomes NaN
    return [rows[i] for i in kept_points(values_NS, MOST_ROWS)]


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None
