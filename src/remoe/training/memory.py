"""The C library's allocator, told to keep what a training step frees."""

import ctypes
import sys

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
