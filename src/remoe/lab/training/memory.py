"""Memory of a run: what it took at the most, and the allocator, told to keep what a training step frees."""

import ctypes
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc reuse large blocks instead of returning them to the system after each operation.

    A training step on the CPU allocates and frees the same large tensors again and again; by default each becomes a
    fresh mapping whose pages the system must clear. Peak memory does not change.

    Returns:
        Whether the allocator took the setting: true on Linux with glibc, false elsewhere (nothing is changed then).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at the most: on the GPU for a CUDA device, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # where it is given: rusage has the peak of the parent, if that was higher
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
