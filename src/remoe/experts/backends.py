"""Which backends there are, which of them can run where, and which one "auto" takes.

A backend `name` is the module `remoe.experts.name`. Besides what `remoe.experts.ops` asks of it, it has

    obstacle(device, dtype, d_model, d_expert) -> str | None      why it cannot run there, or None when it can
"""

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from remoe.errors import ConfigError

BACKENDS = ("naive", "loop", "grouped", "triton", "sonic")
MODULES = {"loop": "remoe.experts.cpu.backend", "triton": "remoe.experts.triton.backend"}
# In the order of preference. "loop" runs everywhere.
_AUTO = {"cpu": ("loop",), "cuda": ("triton", "grouped", "loop")}

logger = logging.getLogger(__name__)


def check_backend(name: str) -> None:
    """Raises ConfigError unless `name` is "auto" or a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"unknown experts backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")


@cache
def resolve_backend(name: str, device_type: str, dtype: torch.dtype, d_model: int, d_expert: int) -> str:
    """The backend to run: `name` itself, or the first that "auto" finds able. The choice is logged, once.

    Raises:
        ConfigError: for an unknown name, or when a backend that was asked for cannot run; the message says why.
    """
    check_backend(name)
    candidates = _AUTO.get(device_type, ("loop",)) if name == "auto" else (name,)
    passed_over = ""
    for candidate in candidates:
        reason = _obstacle(candidate, device_type, dtype, d_model, d_expert)
        if reason is None:
            break
        if name != "auto":
            raise ConfigError(f"experts backend {name!r} cannot run here: {reason}")
        passed_over += f"; not {candidate}: {reason}"
    where = f"{device_type} in {str(dtype).removeprefix('torch.')}"
    logger.info("experts backend: %s (asked for: %s) on %s%s", candidate, name, where, passed_over)
    return candidate


def _obstacle(name: str, device_type: str, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
    return backend_module(name).obstacle(torch.device(device_type), dtype, d_model, d_expert)


def backend_module(name: str) -> ModuleType:
    """The module of a backend."""
    return import_module(MODULES.get(name, f"remoe.experts.{name}"))
