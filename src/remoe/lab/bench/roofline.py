"""The rates of a machine that bound the speed of every implementation."""

from dataclasses import dataclass

import torch

from remoe.lab.bench.timing import median_seconds
from remoe.matmul import product


@dataclass(frozen=True)
class Roofline:
    """Rates of this machine, measured in the same run as the implementations.

    Attributes:
        gemm_flops: of a large square matrix product in the benchmark's dtype, in FLOP/s, by the faster of the
            libraries that PyTorch contains.
        default_gemm_flops: the same by `torch.mm`.
        read_bytes: of a sum over an array larger than the caches, in bytes/s.
    """

    gemm_flops: float
    default_gemm_flops: float
    read_bytes: float


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures both rates; takes about a second."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    memory = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    gemm = median_seconds({"mm": lambda: torch.mm(a, b), "product": lambda: product(a, b)}, device, repetitions=9)
    read = median_seconds({"read": memory.sum}, device, repetitions=9)["read"]
    return Roofline(2 * n**3 / min(gemm.values()), 2 * n**3 / gemm["mm"], 4 * memory.numel() / read)
