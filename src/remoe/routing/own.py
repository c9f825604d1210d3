"""Routers of the user's own, from files outside this package."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from remoe.errors import ConfigError

VARIABLE = "REMOE_ROUTERS"


def load_own_routers() -> None:
    """Runs the files that the environment variable names, which put their classes into `remoe.routing.ROUTERS`.

    Several are separated as in PATH. Called when `remoe.routing` is imported, so that every command and every process
    that it starts knows them.

    Raises:
        ConfigError: when a file cannot be read.
    """
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        spec = spec_from_file_location(Path(path).stem, path)
        if spec is None or not Path(path).is_file():
            raise ConfigError(f"{VARIABLE} names {path}, which is not a Python file")
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
