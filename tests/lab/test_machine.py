"""Memory of a process: its peak, and what it holds."""

import mmap
import subprocess
import sys

import pytest
import torch

from remoe.lab.machine import peak_memory, used_memory

PEAK = "import torch; from remoe.lab.machine import peak_memory; print(peak_memory(torch.device('cpu')))"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process inherits nothing")
def test_the_peak_is_the_processes_own():
    """Not that of the one which started it, as a comparison starts its runs."""
    block = bytearray(2**30)
    block[::4096] = b"x" * (2**30 // 4096)
    child = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 2**25 < int(child.stdout) < 2**30


def test_memory_in_use_counts_what_is_held_now():
    device, size = torch.device("cpu"), 2**26
    before = used_memory(device)
    block = mmap.mmap(-1, size)  # not from the allocator, which may keep what is freed
    block[::4096] = b"x" * (size // 4096)
    held = used_memory(device)
    assert held - before == pytest.approx(size, rel=0.2)
    assert held <= peak_memory(device)
    block.close()
    assert used_memory(device) < held - size / 2
