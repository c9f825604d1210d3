"""`remoe bench layer | decode | lora | train-step | diff`: tables of measurements, JSON files that `diff` compares."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import parse
from remoe.lab.console import Console
from remoe.lab.outputs import check_output, json_with, write_output

QUICK_ROUNDS = 3
MOST_THREADS = 4096  # torch takes any number, and fails later


@dataclass(frozen=True)
class Common:
    """Options of every benchmark."""

    out: Path | None = None
    """JSON file to write the measurements to, with the machine, versions and threads."""
    threads: int | None = None
    """Number of CPU threads; PyTorch's default otherwise."""


@dataclass(frozen=True)
class LayerArguments(Common):
    """Time the forward and backward pass of one layer, including its router, against a dense SwiGLU layer.

    The dense layers have the same active FLOPs. Implementations take turns, and the table shows medians. Columns: "ms"
    time; "+-" distance of the quartiles over the median; "/ best" time divided by that of the fastest dense layer that
    PyTorch can run here (MKL, oneDNN or torch.compile); "/ dense" divided by that of nn.Linear; "/ GEMM" FLOP/s of the
    experts as a fraction of those of a large matrix product; "peak" peak memory in MB; "all on" the same with every
    expert active; "host" (GPU only) time until the host has
    launched all kernels, in ms.
    """

    cases: Literal["auto", "cpu", "cuda", "experts"] = "auto"
    """Sizes to measure: those for the device (auto), for a CPU, for a GPU, or 8 to 128 experts at equal active size."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is float32 on a CPU and bfloat16 on a GPU."""
    backends: tuple[str, ...] = ("auto",)
    """Implementations of our experts to measure: auto, naive, cpu, grouped, triton, sonic."""
    peers: bool = True
    """Also measure the other implementations that are installed."""
    compiled: bool = True
    """Also measure the dense layer under torch.compile, which takes some seconds for each size."""
    repetitions: int = 15
    """Number of timed rounds."""
    quick: bool = False
    """At most 3 rounds, and only our layers and the dense ones, without torch.compile."""


@dataclass(frozen=True)
class DecodeArguments(LayerArguments):
    """Time the forward pass of one layer on a few tokens, as in generation.

    The lower bound is the time to read the weights of the active experts, at the memory bandwidth measured in the same
    run. Column "/ reading" is the time divided by that bound.
    """

    cases: Literal["auto"] = "auto"
    """Sizes to measure; there is one set."""


@dataclass(frozen=True)
class LoraArguments(Common):
    """Time the forward and backward pass of one layer with LoRA on its experts, on the routed pairs and by PEFT.

    The weights are frozen, with 8, 32 and 128 experts of two sizes and float32 on a CPU, bfloat16 on a GPU.
    Implementations take turns, and the table shows medians. Columns: "ms" time; "+-" distance of the quartiles over the
    median; "/ PEFT" time divided by PEFT's; "peak" peak memory of the pass in MB. Needs `pip install 'remoe[lora]'`.
    """

    rank: int = 16
    """Rank of the adapters."""
    repetitions: int = 9
    """Number of timed rounds."""
    quick: bool = False
    """At most 3 rounds, and only 8 and 32 experts of the smaller size."""


@dataclass(frozen=True)
class TrainStepArguments(Common):
    """Time whole training steps of `remoe train` against transformers' Mixtral in transformers' Trainer.

    All contestants have the same shape, batch, data and optimiser, and take turns. Columns: "/ reference" tokens/s
    divided by Mixtral's; "/ GEMM" the model's FLOP/s as a fraction of those of a large matrix product. Needs
    `pip install 'remoe[bench]'`.
    """

    preset: str = "mini"
    """Model size, batch size and schedule of every contestant."""
    data: str | None = None
    """Text, which is prepared in runs/data, or a folder written by `remoe data prepare`. By default the standard
    library."""
    num_experts: int | None = None
    """Number of experts, instead of the preset's."""
    batch_size: int | None = None
    """Sequences per step, instead of the preset's."""
    compile: bool = False
    """Compile our models with torch.compile."""
    contestants: tuple[str, ...] = ()
    """Those to measure beside "mixtral grouped_mm", by their names in the table; by default all."""
    settle: int = 120
    """Training steps before ReLU routing is measured: it starts with half of its experts active."""
    rounds: int = 7
    """Number of turns of each contestant; the table shows the median."""
    steps: int = 5
    """Steps per turn."""


@dataclass(frozen=True)
class DiffArguments:
    """Compare two files that `remoe bench layer`, `decode`, `lora` or `train-step` wrote with --out.

    Columns: "before" and "after" in ms; "ratio" after / before; "+-" the larger spread of the two, in percent. A change
    of less than two spreads is called "within spread". The lines above the table name all facts of machine, versions
    and rates that differ.
    """

    before: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BEFORE")]
    """JSON file of the earlier measurement."""
    after: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="AFTER")]
    """JSON file of the later measurement."""


def diff_command(argv: list[str]) -> int:
    """Runs `remoe bench diff`; returns the exit code."""
    arguments = parse(DiffArguments, argv, prog="remoe bench diff")
    from remoe.lab.bench.diff import compare_files

    found = compare_files(arguments.before, arguments.after)
    console = Console()
    for line in found.conditions:
        console.print(line, markup=False, highlight=False)
    for case in dict.fromkeys(change.case for change in found.changes):
        table = Table(
            title=f"T, D, F, E, k = {case}" if case else "training step", title_justify="left", box=SIMPLE_HEAD
        )
        table.add_column("implementation", no_wrap=True)
        for column in ("before", "after", "ratio", "+-", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for change in found.changes:
            if change.case == case:
                spread = "" if change.spread is None else f"{change.spread:.0%}"
                times = (_figure(change.before), _figure(change.after), f"{change.ratio:.2f}")
                table.add_row(change.name, *times, spread, change.verdict)
        console.print(table)
    for line in found.only:
        console.print(line, markup=False, highlight=False)
    return 0


def layer_command(argv: list[str]) -> int:
    """Runs `remoe bench layer`; returns the exit code."""
    return _layer_or_decode(parse(LayerArguments, argv, prog="remoe bench layer"), "layer")


def decode_command(argv: list[str]) -> int:
    """Runs `remoe bench decode`; returns the exit code."""
    return _layer_or_decode(parse(DecodeArguments, argv, prog="remoe bench decode"), "decode")


def lora_command(argv: list[str]) -> int:
    """Runs `remoe bench lora`; returns the exit code."""
    arguments = parse(LoraArguments, argv, prog="remoe bench lora")
    for name in ("rank", "repetitions"):
        if (number := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name} must be at least 1, but is {number}")
    _start(arguments)
    import torch

    from remoe.lab.bench import lora
    from remoe.lab.bench.roofline import describe, libraries, measure_roofline
    from remoe.lab.machine import keep_freed_memory, machine, pick_device

    lora.check_peft()
    keep_freed_memory()
    device = pick_device("auto")
    name = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    repetitions = min(arguments.repetitions, QUICK_ROUNDS) if arguments.quick else arguments.repetitions
    console, rows, roofline = Console(), [], measure_roofline(device, dtype)
    facts = machine(device) | libraries()
    for case in lora.CASES[:2] if arguments.quick else lora.CASES:
        rows.append(lora.bench_lora(case, arguments.rank, device, dtype, repetitions))
        caption = f"{describe(facts, roofline, name)}. Adapters: {rows[-1]['adapter_megabytes']:.1f} MB."
        console.print(_table(case, rows[-1], caption))
        measured = {"machine": facts, "dtype": name, "roofline": asdict(roofline), "rows": rows}
        _write(arguments, {**measured, "repetitions": repetitions})
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


def train_step_command(argv: list[str]) -> int:
    """Runs `remoe bench train-step`; returns the exit code."""
    arguments = parse(TrainStepArguments, argv, prog="remoe bench train-step")
    _start(arguments)
    import torch

    from remoe.lab.bench import roofline
    from remoe.lab.bench.train_step import CONTESTANTS, TrainStepOptions, train_step
    from remoe.lab.machine import machine, pick_device

    given, config = asdict(arguments), {}
    for name in ("num_experts", "batch_size", "compile"):
        if (value := given.pop(name)) not in (None, False):
            config[name] = value
    given["contestants"] = given["contestants"] or tuple(CONTESTANTS)
    del given["out"], given["threads"]
    result = train_step(TrainStepOptions(**given, config=config))
    device = pick_device("auto")
    facts, dtype = machine(device) | roofline.libraries(), "bfloat16" if device.type == "cuda" else "float32"
    rates = roofline.measure_roofline(device, getattr(torch, dtype))
    for row in result.rows:
        row["share_of_gemm_rate"] = row["model_flops"] / rates.gemm_flops
    columns = {
        "tokens_per_second": "tokens/s",
        "ms_per_step": "ms",
        "ratio_to_reference": "/ reference",
        "share_of_gemm_rate": "/ GEMM",
        "sparsity": "sparsity",
    }
    table = Table(title="training step", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = roofline.describe(facts, rates, dtype), "left"
    table.add_column("implementation", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(row["name"], *("" if row[c] is None else _figure(row[c]) for c in columns))
    Console().print(table)
    _write(
        arguments,
        {
            "machine": facts,
            "roofline": asdict(rates),
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

    from remoe.experts import check_backend, resolve_backend
    from remoe.lab.bench import decode, layer
    from remoe.lab.bench.roofline import describe, libraries, measure_roofline
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
    for backend, case in itertools.product(arguments.backends, cases):  # checked before the work, not after it
        resolve_backend(backend, device.type, dtype, case.D, case.F)
    console, rows = Console(), []
    compiled, peers = arguments.compiled and not arguments.quick, arguments.peers and not arguments.quick
    if compiled and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        console.print("No C++ compiler here: the dense layer is not measured under torch.compile.")
        compiled = False
    repetitions = min(arguments.repetitions, QUICK_ROUNDS) if arguments.quick else arguments.repetitions
    roofline = measure_roofline(device, dtype)
    facts = machine(device) | libraries()
    for case in cases:
        row = bench(case, device, dtype, arguments.backends, peers, repetitions, roofline, compiled)
        rows.append(row)
        caption = f"{describe(facts, roofline, name)}. Fastest dense layer: {row['fastest_dense']}."
        console.print(_table(case, row, caption))
        measured = {"machine": facts, "dtype": name, "roofline": asdict(roofline), "rows": rows}
        _write(arguments, {**measured, "repetitions": repetitions})  # after every case: a later one may be interrupted
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


# Name in a row: heading of the column.
_COLUMNS = {
    "milliseconds": "ms",
    "spread": "+-",
    "ratio_to_fastest_dense": "/ best",
    "ratio_to_dense": "/ dense",
    "ratio_to_peft": "/ PEFT",
    "share_of_gemm_rate": "/ GEMM",
    "host_milliseconds": "host",
    "peak_megabytes": "peak",
    "dense_stage_peak_megabytes": "all on",
    "active_experts": "active",
    "ratio_to_reading_the_weights": "/ reading",
}


def _table(case: object, row: dict, caption: str) -> Table:
    columns = [name for name in _COLUMNS if row.get(name)]
    table = Table(title=f"T, D, F, E, k = {case}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = caption, "left"
    table.add_column("implementation", no_wrap=True)
    for column in columns:
        table.add_column(_COLUMNS[column], justify="right", no_wrap=True)
    for name in row["milliseconds"]:
        table.add_row(name, *(_cell(column, row[column][name]) if name in row[column] else "" for column in columns))
    return table


def _cell(column: str, value: float) -> str:
    return f"{value:.0%}" if column == "spread" else _figure(value)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _start(arguments: Common) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: otherwise its profiler prints,
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of memory allocated before it started
    if arguments.threads is not None:
        if not 1 <= arguments.threads <= MOST_THREADS:
            raise ConfigError(f"--threads must be from 1 to {MOST_THREADS}, but is {arguments.threads}")
        import torch

        torch.set_num_threads(arguments.threads)
    if arguments.out is not None:  # checked before the work, not after it
        check_output("--out", arguments.out, json_with("machine", "rows"))


def _write(arguments: Common, measured: dict) -> None:
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_output(arguments.out, (json.dumps(measured, indent=2) + "\n").encode())
