"""The errors that a user can cause: each is one clear line, and exit code 2 at the command line."""

from collections.abc import Iterable


class RemoeError(Exception):
    """Base of every error caused by input rather than by a defect of this package."""


class ConfigError(RemoeError, ValueError):
    """A setting that cannot work: k > E, an unknown router, heads that do not divide the width."""


class DataError(RemoeError):
    """A missing, empty, truncated or foreign source or shard."""


class CheckpointError(RemoeError):
    """A checkpoint or a run's folder that is missing, incomplete or belongs to something else."""


class ExtraError(RemoeError, ImportError):
    """A package that an extra of this one installs is missing."""


def missing_extra(error: ModuleNotFoundError, extra: str, what: str) -> ExtraError:
    """The error for a missing package: one line that names the extra."""
    return ExtraError(f"{what} needs {error.name}: pip install 'remoe[{extra}]'")


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError for a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}; choose one of: {', '.join(choices)}")
