"""`remoe bench layer | decode | generate | lora | train-step | diff`: tables, and JSON files that `diff` compares."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from remoe.errors import ConfigError
from remoe.lab.cli.bench_options import (
    Common,
    DecodeArguments,
    DiffArguments,
    GenerateArguments,
    LayerArguments,
    LoraArguments,
    TrainStepArguments,
)
from remoe.lab.cli.parsing import parse
from remoe.lab.console import Console
from remoe.lab.outputs import check_output, json_with, write_output

if TYPE_CHECKING:
    import torch

    from remoe.lab.bench.step_profile import StepProfile

QUICK_ROUNDS, QUICK_BATCH, QUICK_LAYERS = 3, 8, 2  # the most with --quick
# What it leaves out, as the tables say.
LEFT_OUT = {
    "layer": "other implementations, torch.compile and memory",
    "decode": "other implementations and torch.compile",
    "generate": f"transformers' Mixtral, batches of more than {QUICK_BATCH} and layers after the second",
    "lora": "128 experts and the larger size",
}
MOST_THREADS = 4096  # torch takes any number, and fails later


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
        caption += _left_out(arguments, "lora")
        console.print(_table(f"T, D, F, E, k = {case}", rows[-1], caption))
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
    from remoe.lab.bench.step_profile import DEFAULT, profile_step
    from remoe.lab.bench.train_step import CONTESTANTS, TrainStepOptions, train_step
    from remoe.lab.machine import machine, pick_device

    given, config = asdict(arguments), {}
    for name in ("num_experts", "batch_size", "compile"):
        if (value := given.pop(name)) not in (None, False):
            config[name] = value
    one = arguments.profile or arguments.quick
    given["contestants"] = given["contestants"] or ((DEFAULT,) if one else tuple(CONTESTANTS))
    del given["out"], given["threads"], given["profile"], given["quick"]
    if arguments.quick:
        given |= {"rounds": min(arguments.rounds, QUICK_ROUNDS), "steps": 1, "warm_up": 2, "biased": True}
    if arguments.profile:
        return _show_profile(arguments, profile_step(TrainStepOptions(**given, config=config)))
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
    if arguments.quick:
        absent = ", ".join(name for name in CONTESTANTS if name not in {row["name"] for row in result.rows})
        table.caption += f"\nLeft out by --quick: {absent}; ReLU routers have biases instead of settling."
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


def _show_profile(arguments: TrainStepArguments, found: "StepProfile") -> int:
    import torch

    from remoe.lab.machine import machine

    facts, details = machine(torch.device("cpu")), found.details
    table = Table(title=f"a step of {details['contestant']}", title_justify="left", box=SIMPLE_HEAD)
    table.caption_justify = "left"
    table.caption = (
        f"{facts['cpu']}, {facts['threads']} threads; {details['ms_per_step']:,.0f} ms a step. "
        f"Neither matrix products nor the attention's core: {details['share_of_rest']:.1%}."
    )
    table.add_column("work", no_wrap=True)
    for heading in ("ms", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("largest operators, ms")
    for row in found.rows:
        operators = ", ".join(f"{name} {_figure(ms)}" for name, ms in row["operators"].items())
        table.add_row(row["name"], _figure(row["ms_per_step"]), f"{row['share']:.1%}", operators)
    Console().print(table)
    _write(arguments, {"machine": facts, "rows": found.rows, "details": details})
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


def generate_command(argv: list[str]) -> int:
    """Runs `remoe bench generate`; returns the exit code."""
    arguments = parse(GenerateArguments, argv, prog="remoe bench generate")
    repetitions = _rounds(arguments)
    if not arguments.batch_sizes or min(arguments.batch_sizes) < 1:
        raise ConfigError(f"--batch-sizes must be at least 1, but are {arguments.batch_sizes}")
    _start(arguments)
    from remoe.lab.bench.generate import Contestants, Work, bench_generate
    from remoe.lab.bench.roofline import describe, libraries, measure_roofline
    from remoe.lab.machine import machine

    device, dtype, name = _device_and_dtype(arguments)
    sizes = {size: getattr(arguments, size) for size in Work.__dataclass_fields__}
    if arguments.quick:
        sizes["layers"] = min(arguments.layers, QUICK_LAYERS)
    work = Work(**sizes)
    roofline = measure_roofline(device, dtype)
    contestants = Contestants(work, device, dtype, arguments.peers and not arguments.quick)
    facts, rows = machine(device) | libraries(), []
    measured = {"machine": facts, "dtype": name, "repetitions": repetitions, "work": asdict(work)}
    batches = [batch for batch in arguments.batch_sizes if batch <= QUICK_BATCH or not arguments.quick]
    for batch in batches or [min(arguments.batch_sizes)]:
        row = bench_generate(contestants, batch, repetitions, roofline)
        rows.append(row)
        caption = f"{work}.\n{describe(facts, roofline, name)}."
        caption += _left_out(arguments, "generate")
        if row["left_out"]:
            caption += f"\nLeft out, for the memory that copies of weights would need: {', '.join(row['left_out'])}."
        Console().print(_table(f"generate, batch {batch}", row, caption))
        _write(arguments, {**measured, "roofline": asdict(roofline), "rows": rows})  # a later one may be interrupted
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


def _rounds(arguments: LayerArguments | GenerateArguments) -> int:
    if arguments.repetitions < 1:
        raise ConfigError(f"--repetitions must be at least 1, but is {arguments.repetitions}")
    return min(arguments.repetitions, QUICK_ROUNDS) if arguments.quick else arguments.repetitions


def _left_out(arguments: LayerArguments | GenerateArguments | LoraArguments, kind: str) -> str:
    return f"\nLeft out by --quick: {LEFT_OUT[kind]}." if arguments.quick else ""


def _device_and_dtype(arguments: LayerArguments | GenerateArguments) -> tuple["torch.device", "torch.dtype", str]:
    import torch

    from remoe.lab.machine import keep_freed_memory, pick_device

    keep_freed_memory()
    device = pick_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"remoe bench measures on cpu or cuda, not on {device.type}")
    name = {"cpu": "float32", "cuda": "bfloat16"}[device.type] if arguments.dtype == "auto" else arguments.dtype
    return device, getattr(torch, name), name


def _layer_or_decode(arguments: LayerArguments, kind: str) -> int:
    repetitions = _rounds(arguments)
    _start(arguments)
    from remoe.experts import check_backend, resolve_backend
    from remoe.lab.bench import decode, layer
    from remoe.lab.bench.roofline import describe, libraries, measure_roofline
    from remoe.lab.machine import machine

    for backend in arguments.backends:
        check_backend(backend)
    device, dtype, name = _device_and_dtype(arguments)
    bench: Callable = decode.bench_decode
    if kind == "layer":
        bench = partial(layer.bench_layer, memory=not arguments.quick)
    cases = layer.CASES[device.type if arguments.cases == "auto" else arguments.cases]
    cases = decode.CASES if kind == "decode" else cases
    for backend, case in itertools.product(arguments.backends, cases):  # checked before the work, not after it
        resolve_backend(backend, device.type, dtype, case.D, case.F)
    console, rows = Console(), []
    compiled, peers = arguments.compiled and not arguments.quick, arguments.peers and not arguments.quick
    if compiled and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        console.print("No C++ compiler here: the dense layer is not measured under torch.compile.")
        compiled = False
    roofline = measure_roofline(device, dtype)
    facts = machine(device) | libraries()
    for case in cases:
        row = bench(case, device, dtype, arguments.backends, peers, repetitions, roofline, compiled)
        rows.append(row)
        if arguments.cases == "experts":
            row["ratio_beyond_weights"] = layer.ratio_beyond_weights(row, rows[0])
        caption = f"{describe(facts, roofline, name)}. Fastest dense layer: {row['fastest_dense']}."
        caption += _left_out(arguments, kind)
        console.print(_table(f"T, D, F, E, k = {case}", row, caption))
        measured = {"machine": facts, "dtype": name, "roofline": asdict(roofline), "rows": rows}
        _write(arguments, {**measured, "repetitions": repetitions})  # after every case: a later one may be interrupted
    if arguments.out is not None:
        print(f"written: {arguments.out}")
    return 0


# Name in a row: heading of the column.
_COLUMNS = {
    "tokens_per_second": "tokens/s",
    "milliseconds": "ms",
    "spread": "+-",
    "ratio_to_fastest_mixtral": "/ theirs",
    "ratio_to_fastest_dense": "/ best",
    "ratio_to_dense": "/ dense",
    "ratio_beyond_weights": "/ first",
    "ratio_to_peft": "/ PEFT",
    "share_of_gemm_rate": "/ GEMM",
    "host_milliseconds": "host",
    "peak_megabytes": "peak",
    "dense_stage_peak_megabytes": "all on",
    "experts_per_token": "/ token",
    "active_experts": "active",
    "ratio_to_reading_the_weights": "/ reading",
}


def _table(title: str, row: dict, caption: str) -> Table:
    columns = [name for name in _COLUMNS if row.get(name)]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
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
