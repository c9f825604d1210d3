"""Peak memory of a process."""

import subprocess
import sys

import pytest

PEAK = "import torch; from remoe.lab.machine import peak_memory; print(peak_memory(torch.device('cpu')))"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process inherits nothing")
def test_the_peak_is_the_processes_own():
    """Not that of the one which started it, as a comparison starts its runs."""
    block = bytearray(2**30)
    block[::4096] = b"x" * (2**30 // 4096)
    child = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 2**25 < int(child.stdout) < 2**30
