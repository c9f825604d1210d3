"""The records of a run: metrics.jsonl, and the sinks beside it."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from remoe.errors import RemoeError
from remoe.lab.files import replacing
from remoe.lab.training.sinks import Sink, TensorBoard, Tracker

Value = TypeVar("Value")


def fill_steps(steps: Sequence[int], values: Sequence[Value]) -> list[Value]:
    """A value for every step from records of some steps: each step takes the next record's value.

    Args:
        steps: steps with a record, ascending from at least 1.
        values: one for each of them.

    Returns:
        As many values as the last of `steps`.
    """
    filled: list[Value] = []
    for step, value in zip(steps, values, strict=True):
        filled += [value] * (step - len(filled))
    return filled


class MetricsWriter:
    """Appends each record to metrics.jsonl as a JSON object, and gives it to the sinks.

    Args:
        folder: the run's folder.
        first_step: records of this step and later ones, left by an interrupted process, are dropped.
        trackers: names of programs that get the records too, see `sinks.TRACKERS`.
        options: of the run, for these.

    Raises:
        DataError: when the files cannot be written.
        RemoeError: when metrics.jsonl is damaged, or a tracker cannot be started.
    """

    def __init__(
        self, folder: Path, first_step: int, trackers: Sequence[str] = (), options: Mapping[str, Any] | None = None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._drop_from(first_step)
        self._sinks: list[Sink] = [TensorBoard(folder, first_step)]
        self._sinks += [Tracker(name, folder, options or {}) for name in trackers]
        self._file = self.path.open("a", buffering=1)

    def write(self, record: dict[str, object]) -> None:
        """Writes a record; it must have "step"."""
        self._file.write(json.dumps(record) + "\n")
        for sink in self._sinks:
            sink.write(record)

    def flush(self) -> None:
        """Makes the records durable, so that no checkpoint is newer than its metrics."""
        os.fsync(self._file.fileno())
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def _drop_from(self, first_step: int) -> None:
        if not self.path.exists():
            return
        with replacing(self.path) as written, written.open("w") as file:
            file.writelines(json.dumps(r) + "\n" for r in iterate_metrics(self.path) if r["step"] < first_step)


class NoMetrics:
    """Takes records as a `MetricsWriter` and writes nothing: for processes beside the one that does."""

    def write(self, record: dict[str, object]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl; see `iterate_metrics`."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict]:
    """The records of a metrics.jsonl in order, one at a time: those of a long run with many experts take gigabytes.

    An incomplete last line, as a crash leaves it, is skipped.

    Raises:
        RemoeError: when another line is not JSON, or is not a record of a step.
    """
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                if next(file, None) is None:
                    return
                raise RemoeError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise RemoeError(f"{path}, line {number}: not a record of a step")
            yield record
