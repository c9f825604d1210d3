"""Routers of the user's own, from files outside this package."""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from remoe.errors import ConfigError
from remoe.routing import ROUTERS


def load_own_routers(files: str) -> None:
    """Runs Python files, which put their classes into `remoe.routing.ROUTERS`.

    Args:
        files: their paths, separated as in PATH.

    Raises:
        ConfigError: when a file cannot be run, or has put nothing there.
    """
    for number, path in enumerate(filter(None, files.split(os.pathsep))):
        before = dict(ROUTERS)
        spec = spec_from_file_location(f"remoe_own_routers_{number}", path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise ConfigError(f"REMOE_ROUTERS names {path}, which is not a Python file")
        try:
            spec.loader.exec_module(module_from_spec(spec))
        except (Exception, SystemExit) as error:  # whatever a user's file can raise
            raise ConfigError(f"REMOE_ROUTERS: {path}: {type(error).__name__}: {error}") from error
        if before == ROUTERS:
            raise ConfigError(f"REMOE_ROUTERS: {path} puts no router into remoe.routing.ROUTERS")
