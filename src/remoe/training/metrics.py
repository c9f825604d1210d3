"""Records of a run: metrics.jsonl, TensorBoard, and the measures drawn from the course of S."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from remoe.errors import RemoeError

Value = TypeVar("Value")

DENSE_ABOVE = 0.45
SPARSE_BELOW = 1.5
SPARSE_STEPS = 10
SETTLED_STEPS, SETTLED_WITHIN, SETTLED_OF_DENSITY = 50, 0.01, 0.08


def stage(sparsity: float, target: float) -> str:
    """The stage of training (arXiv 2412.14711, section 3.4) that a sparsity S belongs to.

    "dense" while more than 45 % of the pairs are active (random weights activate a half), "sparse" once they are
    at most 1.5 times the wanted number, "sparsifying" in between.
    """
    density = 1 - sparsity
    if target == 0:
        return "dense"
    if density <= SPARSE_BELOW * (1 - target):
        return "sparse"
    return "dense" if density >= DENSE_ABOVE else "sparsifying"


def settled_within(target: float) -> float:
    """How far S may be from its target to count as settled.

    0.01, and 8 % of the wanted density where that is less, as at k = 1 from E = 16 on: at E = 128 a model whose experts
    are all closed would else be near.
    """
    return SETTLED_WITHIN if SETTLED_OF_DENSITY * (1 - target) >= SETTLED_WITHIN else SETTLED_OF_DENSITY * (1 - target)


def settling_time(sparsities: Sequence[float], target: float) -> int | None:
    """Stages I and II in steps: the first index from which S stays near its target for SETTLED_STEPS steps.

    Args:
        sparsities: S of each step, from the first.
        target: 1 - k/E.

    Returns:
        Index (steps before it are stages I and II), or None when S never settles.
    """
    within, tolerance = 0, settled_within(target)
    for index, sparsity in enumerate(sparsities):
        within = within + 1 if abs(sparsity - target) <= tolerance else 0
        if within == SETTLED_STEPS:
            return index - SETTLED_STEPS + 1
    return None


def first_sparse_step(sparsities: Sequence[float], target: float) -> int:
    """The step, from 1, at which stage III begins; one behind the last where it never does.

    That is where S is in it for SPARSE_STEPS steps, or to the end: before, it may just pass through, when the penalty
    has closed too much and the experts open again.
    """
    in_a_row = 0
    for step, sparsity in enumerate(sparsities, 1):
        in_a_row = in_a_row + 1 if stage(sparsity, target) == "sparse" else 0
        if in_a_row == SPARSE_STEPS:
            return step - SPARSE_STEPS + 1
    return len(sparsities) - in_a_row + 1


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
