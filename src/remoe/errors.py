"""The errors that a user can cause. The command line prints each of them in one line and exits with code 2."""

import math
import sys
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any


class RemoeError(Exception):
    """Base of every error that is caused by input rather than by a defect of this package."""


class ConfigError(RemoeError, ValueError):
    """A setting that cannot work: k > E, an unknown router, heads that do not divide the width."""


class DataError(RemoeError):
    """A source or shard of data that is missing, empty, truncated or of another format."""


class CheckpointError(RemoeError):
    """A checkpoint or a run's folder that is missing, incomplete or belongs to something else."""


class HubError(RemoeError):
    """The Hugging Face Hub cannot be reached or refuses what was asked of it."""


class OutOfMemory(RemoeError):
    """Memory ran out in work whose size options decide."""


class ExtraError(RemoeError, ImportError):
    """A package is missing that one of this package's extras installs."""


def missing_extra(error: ModuleNotFoundError, extra: str, what: str) -> ExtraError:
    """The error for a package that is not installed, in one line that names the extra.

        try:
            import lm_eval
        except ModuleNotFoundError as error:
            raise missing_extra(error, "eval", "remoe eval --tasks") from error

    Args:
        error: raised by the import.
        extra: name in `pip install 'remoe[extra]'`.
        what: what needs the package, the subject of the message.

    Raises:
        ModuleNotFoundError: `error` itself, when the module is one of ours or of Python's: no extra would help.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "remoe") or package in sys.stdlib_module_names:
        raise error
    return ExtraError(f"{what} needs {package}: pip install 'remoe[{extra}]'", name=error.name)


def check(holds: bool, message: str) -> None:
    """Raises ConfigError with this message unless it holds."""
    if not holds:
        raise ConfigError(message)


def check_integers(least: int, **values: object) -> None:
    """Raises ConfigError unless each of the values, given by its name, is a whole number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number, but is {value!r}")
        check(int(value) >= least, f"{name} must be at least {least}, but is {value}")


def check_numbers(least: float, **values: object) -> None:
    """Raises ConfigError unless each of the values, given by its name, is a finite number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) < math.inf:
            raise ConfigError(f"{name} must be a finite number of at least {least}, but is {value!r}")


def check_shapes(shape: Sequence[int], **tensors: Any) -> None:
    """Each tensor that is given (not None) must have this shape, that of x without D."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ConfigError(f"{name} must be {tuple(shape)} for this x, but is {tuple(tensor.shape)}")


def check_choice(what: str, value: object, choices: Collection[str]) -> None:
    """Raises ConfigError for a value that is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"unknown {what} {value!r}; choose one of: {', '.join(choices)}")
