"""Figures of GPUs from their data sheets. Needs no torch: `remoe plan` is quick."""

import math
from dataclasses import dataclass, fields, replace

from remoe.errors import ConfigError, check


@dataclass(frozen=True)
class GPU:
    """A GPU and the machine that it is in.

    Attributes:
        tflops: rate of dense bfloat16 matrix products, in 10^12 floating-point operations per second.
        memory: in GB (10^9 bytes).
        bandwidth: of this memory, in GB/s.
        within: what it can send to the other GPUs of its node, in GB/s, one way.
        between: what it can send to other nodes, in GB/s, one way.
        per_node: GPUs of a node.
        source: where the figures come from.
    """

    tflops: float
    memory: float
    bandwidth: float
    within: float
    between: float
    per_node: int = 8
    source: str = "given by the user"


# Data sheets give matrix rates with sparsity (twice those here) and NVLink's bandwidth as the sum of both ways.
GPUS = {
    "a100": GPU(
        312, 80, 2039, 300, 25, 8,
        "NVIDIA A100 80GB SXM data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4), DGX A100: 8 x 200 Gb/s",
    ),
    "h100": GPU(
        989.5, 80, 3350, 450, 50, 8,
        "NVIDIA H100 SXM data sheet (nvidia.com/en-us/data-center/h100), DGX H100: 8 x 400 Gb/s",
    ),
    "h200": GPU(
        989.5, 141, 4800, 450, 50, 8,
        "NVIDIA H200 SXM data sheet (nvidia.com/en-us/data-center/h200), DGX H200: 8 x 400 Gb/s",
    ),
    "b200": GPU(
        2250, 180, 8000, 900, 50, 8,
        "NVIDIA DGX B200 data sheet (nvidia.com/en-us/data-center/dgx-b200): 8 GPUs, 8 x 400 Gb/s",
    ),
}  # fmt: skip
_SXM = ("a100-sxm4-80gb", "h100 80gb hbm3", "h200", "b200")  # of the names that drivers give, those of these GPUs


def parse_gpu(text: str) -> GPU:
    """The GPU that `--gpu` describes: a name, figures such as "tflops=400,memory=64", or figures after a name.

    Raises:
        ConfigError: for unknown names and figures, and where no name is given and a figure is missing.
    """
    known = [field.name for field in fields(GPU) if field.name != "source"]
    first, *rest = (part.strip() for part in text.split(","))
    gpu = None
    if "=" not in first:
        if first.lower() not in GPUS:
            raise ConfigError(
                f"--gpu: unknown GPU {first!r}; choose of: {', '.join(GPUS)}, or give figures: {', '.join(known)}"
            )
        gpu = GPUS[first.lower()]
    else:
        rest.insert(0, first)
    figures: dict[str, float] = {}
    for part in rest:
        name, _, value = (piece.strip() for piece in part.partition("="))
        check(name in known, f"--gpu: unknown figure {name!r}; choose of: {', '.join(known)}")
        check(name not in figures, f"--gpu: {name} is given twice")
        figures[name] = _number(name, value)
    if "per_node" in figures:
        check(figures["per_node"].is_integer(), "--gpu: per_node must be a whole number")
        figures["per_node"] = int(figures["per_node"])
    if gpu is not None and not figures:
        return gpu
    if gpu is not None:
        return replace(gpu, **figures, source=f"{gpu.source}; given by the user: {', '.join(rest)}")
    missing = [name for name in known if name not in figures and name != "per_node"]
    check(not missing, f"--gpu: without a name of {', '.join(GPUS)}, give {', '.join(missing)} too")
    return GPU(**figures)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of the GPU whose driver calls it so; None where the table lacks it."""
    for key, words in zip(GPUS, _SXM, strict=True):
        if words in device_name.lower() and not any(other in device_name.lower() for other in ("nvl", "pcie", "mig")):
            return GPUS[key].tflops * 1e12
    return None


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    check(math.isfinite(value) and value > 0, f"--gpu: {name} must be a number above 0, not {text!r}")
    return value
