"""`remoe bench layer | decode | train-step`: tables of measured figures, and JSON with what they were measured on."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import parse
from remoe.lab.console import Console


@dataclass(frozen=True)
class Common:
    """What every benchmark has."""

    out: Path | None = None
    """JSON file for the figures, with machine, versions and threads."""
    threads: int | None = None
    """CPU threads; by default PyTorch's."""


@dataclass(frozen=True)
class LayerArguments(Common):
    """Forward and backward pass of one layer, router included, as multiples of a dense SwiGLU layer's time.

    The dense layer has the same active FLOPs. Implementations take turns; figures are medians. "/ dense" is the time
    as a multiple of the dense layer's, "/ GEMM" the experts' FLOPs per second as a share of a large matrix
    product's, "peak" the most memory at once in MB, "act." that without the weights' gradients, "all on" the peak with
    every expert active; on a GPU, "host" is the time in ms until the host has launched it all.
    """

    cases: Literal["auto", "cpu", "cuda", "experts"] = "auto"
    """Sizes: those for the device, or "experts": E from 8 to 128 at the same active size."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    backends: tuple[str, ...] = ("auto",)
    """Expert backends of our layer: auto, naive, loop, grouped, triton, sonic."""
    peers: bool = True
    """Measure other implementations too, those that are installed."""
    repetitions: int = 15
    """Timed rounds."""


@dataclass(frozen=True)
class DecodeArguments(LayerArguments):
    """Forward pass of one layer for a few tokens, as in generation.

    Time is bound by reading the weights of the active experts: "/ reading" is the time as a multiple of that, at the
    memory bandwidth measured in the same run.
    """

    cases: Literal["auto"] = "auto"
    """There is one set of sizes."""


@dataclass(frozen=True)
class TrainStepArguments(Common):
    """Whole training steps through `remoe train`'s loop, against transformers' Mixtral classes in its Trainer.

    Same shape, batch, data and optimiser; the contestants take turns. Needs the extra "bench" (accelerate).
    """

    preset: str = "mini"
    """Model size, batch and schedule of every contestant."""
    data: str | None = None
    """Folder written by `remoe data prepare`; by default the standard library, prepared in runs/data."""
    settle: int = 120
    """Steps that ReLU routing trains before it is measured: it starts with half of its experts active."""
    rounds: int = 7
    """Turns of each contestant; the table has the median."""
    steps: int = 5
    """Steps of a turn."""


def layer_command(argv: list[str]) -> int:
    """Run `remoe bench layer`; returns the exit code."""
    return _layer_or_decode(parse(LayerArguments, argv, prog="remoe bench layer"), "layer")


def decode_command(argv: list[str]) -> int:
    """Run `remoe bench decode`; returns the exit code."""
    return _layer_or_decode(parse(DecodeArguments, argv, prog="remoe bench decode"), "decode")


def train_step_command(argv: list[str]) -> int:
    """Run `remoe bench train-step`; returns the exit code, raises ConfigError or DataError for bad input."""
    arguments = parse(TrainStepArguments, argv, prog="remoe bench train-step")
    _start(arguments)
    from remoe.lab.bench.train_step import TrainStepOptions, train_step
    from remoe.lab.machine import machine, pick_device

    given = {name: value for name, value in asdict(arguments).items() if name not in ("out", "threads")}
    result = train_step(TrainStepOptions(**given))
    columns = ("tokens_per_second", "ms_per_step", "ratio_to_reference", "sparsity")
    table = Table(title="training step", title_justify="left")
    table.add_column("implementation")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in result.rows:
        table.add_row(row["name"], *("" if row[c] is None else _figure(row[c]) for c in columns))
    Console().print(table)
    _write(
        arguments,
        {
            "machine": machine(pick_device("auto")),
            "rows": result.rows,
            "details": result.details,
        },
    )
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


def _layer_or_decode(arguments: LayerArguments, kind: str) -> int:
    if arguments.repetitions < 1:
        raise ConfigError(f"--repetitions must be at least 1, but is {arguments.repetitions}")
    _start(arguments)
    import torch

    from remoe.experts.backends import check_backend
    from remoe.lab.bench import decode, layer
    from remoe.lab.bench.roofline import measure_roofline
    from remoe.lab.machine import keep_freed_memory, machine, pick_device

    for backend in arguments.backends:
        check_backend(backend)
    keep_freed_memory()
    device = pick_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"remoe bench measures on cpu or cuda, not on {device.type}")
    name = {"cpu": "float32", "cuda": "bfloat16"}[device.type] if arguments.dtype == "auto" else arguments.dtype
    dtype = getattr(torch, name)
    bench: Callable = decode.bench_decode if kind == "decode" else layer.bench_layer
    cases = layer.CASES[device.type if arguments.cases == "auto" else arguments.cases]
    cases = decode.CASES if kind == "decode" else cases
    console, rows = Console(), []
    roofline = measure_roofline(device, dtype)
    facts = machine(device)
    console.print(
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, {name}: "
        f"GEMM {roofline.gemm_flops / 1e9:,.0f} GFLOP/s "
        f"(torch.mm {roofline.default_gemm_flops / 1e9:,.0f}), memory reads {roofline.read_bytes / 1e9:,.1f} GB/s",
        highlight=False,
        soft_wrap=True,
    )
    for case in cases:
        row = bench(case, device, dtype, arguments.backends, arguments.peers, arguments.repetitions, roofline)
        rows.append(row)
        console.print(_table(case, row))
        measured = {"machine": facts, "dtype": name, "roofline": asdict(roofline), "rows": rows}
        _write(arguments, {**measured, "repetitions": arguments.repetitions})  # now: the next may be cut off
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


# of a row: the heading of its column
_COLUMNS = {
    "milliseconds": "ms",
    "ratio_to_dense": "/ dense",
    "share_of_gemm_rate": "/ GEMM",
    "host_milliseconds": "host",
    "peak_megabytes": "peak",
    "activation_megabytes": "act.",
    "dense_stage_peak_megabytes": "all on",
    "active_experts": "active",
    "ratio_to_reading_the_weights": "/ reading",
}


def _table(case: object, row: dict) -> Table:
    columns = [name for name in _COLUMNS if row.get(name)]
    table = Table(title=f"T, D, F, E, k = {case}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("implementation", no_wrap=True)
    for column in columns:
        table.add_column(_COLUMNS[column], justify="right", no_wrap=True)
    for name in row["milliseconds"]:
        table.add_row(name, *(_figure(row[column][name]) if name in row[column] else "" for column in columns))
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _start(arguments: Common) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: its profiler would print to stderr,
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and of memory that was there before
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ConfigError(f"--threads must be at least 1, but is {arguments.threads}")
        import torch

        torch.set_num_threads(arguments.threads)
    if arguments.out is not None and arguments.out.is_dir():  # found out before the work, not after it
        raise ConfigError(f"--out {arguments.out} is a folder; name a file")


def _write(arguments: Common, measured: dict) -> None:
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n")
