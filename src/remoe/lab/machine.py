"""The machine that a command runs on: its devices, its memory, and the facts that are reported with a measurement."""

import ctypes
import os
import platform
import re
import resource
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import remoe
from remoe.errors import ConfigError

PACKAGES = ("torch", "transformers", "triton", "accelerate", "peft", "scattermoe", "megablocks", "sonic-moe")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ConfigError: when the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise ConfigError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def keep_freed_memory() -> bool:
    """Makes glibc reuse large blocks instead of returning them to the system after each operation.

    A training step on the CPU allocates and frees the same large tensors again and again; by default each becomes a
    fresh mapping whose pages the system must clear. Peak memory does not change.

    Returns:
        Whether the allocator took the setting: true on Linux with glibc; elsewhere false, and nothing has changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: GPU memory for a CUDA device, otherwise resident main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # preferred, because rusage starts from the peak of the parent process
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds now: resident main memory; for a CUDA device the most GPU memory so far."""
    held = Path("/proc/self/statm")
    if device.type == "cuda" or not held.exists():
        return peak_memory(device)
    return int(held.read_text().split()[1]) * resource.getpagesize()


def machine(device: torch.device) -> dict[str, object]:
    """Date, processor, cores, threads, GPU and the versions of the installed packages that affect a measurement."""
    facts: dict[str, object] = {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "remoe": remoe.__version__,  # of the code that runs, which an old editable install may call otherwise
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "") or (
        platform.processor() or platform.machine()
    )
