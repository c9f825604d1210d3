"""What figures were measured on: versions, threads, and the rates that bound every figure."""

import os
import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from remoe.bench.timing import median_seconds
from remoe.gemm import product

PACKAGES = ("remoe", "torch", "transformers", "triton", "accelerate", "scattermoe", "megablocks", "sonic-moe")


def machine(device: torch.device) -> dict[str, object]:
    """Date, processor, cores, threads and the versions of what is installed."""
    facts: dict[str, object] = {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
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


@dataclass(frozen=True)
class Roofline:
    """Rates of this machine, measured in the same run as the figures.

    Attributes:
        gemm_flops: of a large square matrix product in the benchmark's dtype, in FLOP/s, by the faster of the
            libraries that PyTorch carries.
        default_gemm_flops: the same by `torch.mm`.
        read_bytes: of a sum over memory that no cache holds, in bytes/s.
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
