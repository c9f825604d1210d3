"""The errors that a user can cause: each is one clear line, and exit code 2 at the command line."""


class RemoeError(Exception):
    """Base of every error caused by input rather than by a defect of this package."""


class ConfigError(RemoeError, ValueError):
    """A setting that cannot work: k > E, an unknown router, heads that do not divide the width."""


class DataError(RemoeError):
    """A missing, empty, truncated or foreign source or shard."""


class CheckpointError(RemoeError):
    """A checkpoint or a run's folder that is missing, incomplete or belongs to something else."""
