"""The rates of a machine that bound the speed of every implementation."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from remoe.lab.bench.dense import has_onednn, onednn_product
from remoe.lab.bench.timing import median_seconds


@dataclass(frozen=True)
class Roofline:
    """Rates of this machine, measured in the same run as the implementations.

    Attributes:
        gemm_flops: of a large square matrix product in the benchmark's dtype, in FLOP/s, by the faster of the
            libraries that PyTorch contains.
        default_gemm_flops: the same by `torch.mm`: on a CPU MKL's in float32, if PyTorch contains it.
        read_bytes: of a sum over an array larger than the caches, in bytes/s.
        onednn_gemm_flops: the same by oneDNN; None where it is not a library of its own to PyTorch.
    """

    gemm_flops: float
    default_gemm_flops: float
    read_bytes: float
    onednn_gemm_flops: float | None = None


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures both rates; takes about a second."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    memory = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    products = {"mm": lambda: torch.mm(a, b)}
    if device.type == "cpu" and dtype is torch.float32 and has_onednn():
        products["oneDNN"] = lambda: onednn_product(a, b)
    gemm = {name: 2 * n**3 / s for name, s in median_seconds(products, device, repetitions=9).items()}
    read = median_seconds({"read": memory.sum}, device, repetitions=9)["read"]
    return Roofline(max(gemm.values()), gemm["mm"], 4 * memory.numel() / read, gemm.get("oneDNN"))


def libraries() -> dict[str, str]:
    """The processor's brand and vector width, and the versions of MKL and oneDNN in this PyTorch, where known."""
    cpuinfo, build = Path("/proc/cpuinfo"), torch.__config__.show()
    vendor = re.search(r"vendor_id\s*: (\S+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", build)
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v?([\d.]+)", build)
    found = {"brand": vendor, "mkl": mkl, "onednn": onednn}
    facts = {name: match.group(1) for name, match in found.items() if match}
    return {**facts, "vectors": torch.backends.cpu.get_cpu_capability()}


def describe(facts: dict[str, object], roofline: Roofline, dtype: str) -> str:
    """One line on the machine, the libraries and their rates, to stand beside a table."""
    where = facts.get("gpu") or f"{facts['cpu']} ({facts.get('brand', 'brand unknown')}, {facts['vectors']})"
    mm = "MKL" if "mkl" in facts and "gpu" not in facts and dtype == "float32" else "torch.mm"
    rates = [f"{mm} {facts['mkl'] + ' ' if mm == 'MKL' else ''}{roofline.default_gemm_flops / 1e9:,.0f} GFLOP/s"]
    if roofline.onednn_gemm_flops:
        rates.append(f"oneDNN {facts.get('onednn', '')} {roofline.onednn_gemm_flops / 1e9:,.0f} GFLOP/s")
    rates.append(f"memory reads {roofline.read_bytes / 1e9:,.1f} GB/s")
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    return f"{where}, {threads}, torch {facts['torch']}, {dtype}, {facts['date']}: {', '.join(rates)}"
