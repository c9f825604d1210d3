"""Where the records of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Legend: L layers, E experts.
"""

import hashlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from remoe.errors import ConfigError, check_choice, missing_extra

TRACKERS = ("wandb", "trackio")
PROJECT = "remoe"
CELL = 12  # pixels of an expert in an image


class Sink(Protocol):
    """Takes the records of a run."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record, which has "step"."""
        ...

    def flush(self) -> None:
        """Makes the records durable, as far as this program decides it."""
        ...

    def close(self) -> None:
        """Ends the records."""
        ...


class TensorBoard:
    """Numbers as curves; at validation steps the load of each expert as an image of all layers, and as histograms.

    Args:
        folder: the run's folder.
        first_step: records of this step and later ones are replaced.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        for name, value in scalars(record):
            self._board.add_scalar(name, value, step)
        if shows_load(record):
            load_LE = np.asarray(record["load_per_expert"])
            self._board.add_image("load_per_expert", load_image(load_LE), step, dataformats="HW")
            for layer, load_E in enumerate(load_LE):
                self._board.add_histogram(f"load_per_expert/{layer}", load_E, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Tracker:
    """A program with the functions of Weights & Biases: `init`, `log` and `finish`.

    Args:
        name: of its package.
        folder: the run's folder; a resumed run continues there what it began.
        options: of the run, as nested dict.

    Raises:
        ExtraError: when the package is not installed.
        ConfigError: when it cannot be started, for example without a login.
    """

    def __init__(self, name: str, folder: Path, options: Mapping[str, Any]) -> None:
        self.package = tracker_package(name)
        place = folder.resolve()
        arguments: dict[str, Any] = {"project": PROJECT, "name": place.name, "config": dict(options), "resume": "allow"}
        if name == "wandb":
            arguments["dir"] = str(place)
            arguments["id"] = hashlib.sha256(f"{place}:{place.stat().st_ino}".encode()).hexdigest()[:16]
        try:
            self.package.init(**arguments)
        except Exception as error:  # of the program's own kinds, which have no common base
            raise ConfigError(f"--log {name}: {' '.join(str(error).split())[:300]}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        values = dict(scalars(record))
        if shows_load(record):
            for layer, load_E in enumerate(record["load_per_expert"]):
                values[f"load_per_expert/{layer}"] = self.package.Histogram(load_E)
        self.package.log(values, step=record["step"])

    def flush(self) -> None:
        """The program itself sees to it."""

    def close(self) -> None:
        self.package.finish()


def tracker_package(name: str) -> ModuleType:
    """The package of a tracker; raises ConfigError for an unknown name, ExtraError when it is not installed."""
    check_choice("--log", name, TRACKERS)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise missing_extra(error, name, f"--log {name}") from error


def shows_load(record: Mapping[str, Any]) -> bool:
    """Whether pictures of the load are made of a record: at validation steps, because they are large."""
    return "validation_loss" in record and bool(record.get("load_per_expert"))


def load_image(load_LE: np.ndarray) -> np.ndarray:
    """(L CELL, E CELL) uint8: a row for each layer, a square for each expert, white for four times the mean load.

    The square root of the load is shown, so that experts with little are told from those with none.
    """
    highest = min(1.0, 4 * float(load_LE.mean())) or 1.0
    shade_LE = np.sqrt(np.clip(load_LE / highest, 0, 1))
    return np.kron(np.round(255 * shade_LE), np.ones((CELL, CELL))).astype(np.uint8)


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by name, without its step."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value
        elif name == "sparsity_per_layer":
            yield from ((f"{prefix}{name}/{layer}", sparsity) for layer, sparsity in enumerate(value))
