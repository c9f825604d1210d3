"""Records of a run: metrics.jsonl, TensorBoard, and the measures drawn from the course of S."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from remoe.errors import RemoeError

Value = TypeVar("Value")


def fill_steps(steps: Sequence[int], values: Sequence[Value]) -> list[Value]:
    """A value for each step from the records of some of them: that of the first record at or behind the step."""
    filled: list[Value] = []
    for step, value in zip(steps, values, strict=True):
        filled += [value] * (step - len(filled))
    return filled


class MetricsWriter:
    """Appends one JSON object a record to metrics.jsonl and the same numbers to TensorBoard.

    Args:
        folder: the run's folder.
        first_step: records of this step and later ones, left by a run that was cut off, are dropped.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self._drop_from(first_step)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, record: dict[str, object]) -> None:
        """Writes a record; it must have "step"."""
        self._file.write(json.dumps(record) + "\n")
        for name, value in _scalars(record):
            self._board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Makes the records durable, so that no checkpoint is newer than its metrics."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        self._board.close()

    def _drop_from(self, first_step: int) -> None:
        if not self.path.exists():
            return
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(json.dumps(r) + "\n" for r in iterate_metrics(self.path) if r["step"] < first_step)
        os.replace(partial, self.path)


def read_metrics(path: Path) -> list[dict]:
    """What `iterate_metrics` gives."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict]:
    """Records of a metrics.jsonl, in order, one at a time: all of a long run with many experts take gigabytes.

    A last line that a crash cut off is left out.

    Raises:
        RemoeError: when a line in the middle is no JSON.
    """
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if next(file, None) is None:
                    return
                raise RemoeError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict) or "step" not in record:
                raise RemoeError(f"{path}, line {number}: not a record of a step")
            yield record


def _scalars(record: dict[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value
        elif name == "sparsity_per_layer":
            yield from ((f"{prefix}{name}/{layer}", sparsity) for layer, sparsity in enumerate(value))
