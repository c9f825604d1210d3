"""Every GPU test and measurement, in parts of less than 9 minutes. Needs CUDA and no network.

    python benchmarks/gpu_suite.py --out FOLDER --parts tests decode
    python benchmarks/gpu_suite.py --out FOLDER --parts train-step

Each command of a part runs in a process of its own with a limit of seconds, writes its log and JSON into the folder,
and does not stop the others when it fails; benchmarks write what they have after each case. `summary.json` has a line
for each command of all calls with this folder, and what was left out. The exit code is 1 when a command failed.
`--parts long` goes on with its runs where the last call stopped.

    python benchmarks/gpu_suite.py --out FOLDER --reduced

runs all parts in small on a CPU, to see that they go through; what only a GPU can run is named and left out.

On a machine without network, packages that it lacks travel as wheels (`pip download --no-deps` elsewhere, `pip install
--no-index --target DIR` there) and this one as its source: `PYTHONPATH=DIR:src`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "accelerate", "tyro", "pydantic", "yaml", "rich", "pyarrow", "pytest", "remoe")
PARTS = ("tests", "train-step", "train-step-compiled", "decode", "sonic", "layer", "long")
Part = Literal[PARTS]
SLOWER = 5  # a CPU may take so many times as long as the limits say
GRACE = 20  # seconds in which a command that is over its limit may save what it has
REMOE = [sys.executable, "-m", "remoe"]
# Tests in several processes, which compile kernels side by side; a kernel that fails takes down its own process alone.
TESTS = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "--dist", "worksteal"]
TESTS += ["-o", "addopts=--import-mode=importlib", str(ROOT / "tests" / "gpu")]
ABLE = """
import torch
from remoe.experts import BACKENDS, resolve_backend
for name in BACKENDS:
    try:
        resolve_backend(name, "cuda", torch.bfloat16, 2048, 1408)
    except ValueError as error:
        print("#", error)
    else:
        print(name)
"""


@dataclass
class Options:
    """Run the GPU suite."""

    out: Path
    """Folder for logs and JSON."""
    parts: tuple[Part, ...] = PARTS
    """What to run, in this order."""
    reduced: bool = False
    """On a CPU, with small models and few repetitions: no figure of it says anything of a GPU."""


@dataclass(frozen=True)
class Command:
    """One process of the suite: its name, its arguments, and its limit in seconds."""

    name: str
    arguments: list[str]
    limit: int


@dataclass(frozen=True)
class LeftOut:
    """What does not run here: its name, and why."""

    name: str
    why: str


Items = Iterator[Command | LeftOut]


def items(options: Options) -> Items:
    """The commands of the parts, whose limits in a part sum to less than 9 minutes, and what is left out of them."""
    made = {
        "tests": tests,
        "train-step": train_steps,
        "train-step-compiled": partial(train_steps, compiled=True),
        "decode": decode,
        "sonic": sonic,
        "layer": layers,
        "long": long_runs,
    }
    for part in options.parts:
        yield from made[part](options)


def tests(options: Options) -> Items:
    """(a) The tests that need a GPU; without one they are collected and skipped."""
    if options.reduced:
        yield LeftOut("tests/gpu", "each test needs CUDA, and is skipped")
    yield Command("tests", [*TESTS, "-n", "0" if options.reduced else "8"], 150)


def train_steps(options: Options, compiled: bool = False) -> Items:
    """(b) Whole training steps beside transformers' Mixtral with grouped_mm; two parts, with torch.compile or not."""
    for experts in (8,) if options.reduced and compiled else (8, 32):
        name = f"train-step-{experts}{'-compiled' if compiled else ''}"
        sizes, contestants = ["--preset", "182m", "--batch-size", "64"], ["remoe relu", "remoe topk", "remoe dense"]
        if options.reduced:
            sizes = ["--preset", "tiny", "--batch-size", "16", "--quick", "--rounds", "1"]
            contestants = ["remoe relu"]
            others = "remoe topk and dense" + (", and 32 experts" if compiled else "")
            yield LeftOut(f"{name}: {others}", "a CPU takes minutes for what shows nothing more")
        arguments = [*sizes, "--num-experts", str(experts), *(["--compile"] if compiled else [])]
        yield Command(name, bench(options, "train-step", *arguments, "--contestants", *contestants, name=name), 260)


def decode(options: Options) -> Items:
    """(c) A layer on few tokens, by every backend that can run here, and the writing of text with each KV cache.

    On a GPU the layer is also timed in a CUDA graph, and transformers compiles models with a static cache into graphs.
    """
    if options.reduced:
        yield LeftOut("decode: CUDA graphs and the backends triton and grouped", "they need CUDA")
        yield LeftOut("generate: transformers' Mixtral", "it is slow on a CPU")
    yield Command("decode", bench(options, "decode", *sizes_of(options), *backends(options), name="decode"), 120)
    small = ["--d-model", "64", "--d-ffn", "32", "--vocab-size", "512", "--batch-sizes", "2", "--quick"]
    small = small if options.reduced else []
    for cache in ("dynamic", "static"):
        name = f"generate-{cache}"
        yield Command(name, bench(options, "generate", "--cache", cache, *small, name=name), 180)


def sonic(options: Options) -> Items:
    """(d) The backend of sonic-moe: one process, so that what its first call compiles in minutes serves all cases."""
    if options.reduced:
        yield LeftOut("sonic", "its kernels are for GPUs")
    else:
        arguments = ["--backends", "sonic", "--no-peers", "--no-compiled"]
        yield Command("sonic", bench(options, "layer", *arguments, name="sonic"), 480)


def layers(options: Options) -> Items:
    """(e) A layer forward and backward: by every backend, for several numbers of experts, and with other tiles."""
    small = sizes_of(options)
    yield Command("layer", bench(options, "layer", *small, *backends(options), name="layer"), 240)
    yield Command("experts", bench(options, "layer", "--cases", "experts", "--no-peers", *small, name="experts"), 90)
    if options.reduced:
        yield LeftOut("tiles", "the kernels of Triton are for GPUs")
    else:
        tiles = [sys.executable, str(ROOT / "benchmarks" / "tune_tiles.py"), "--out", str(options.out / "tiles.json")]
        yield Command("tiles", tiles, 65)


def long_runs(options: Options) -> Items:
    """(f) Runs over 300 million tokens, several at a time; the same call goes on from their last checkpoints.

    It takes several calls. Records of finished runs, to be committed, are in FOLDER/long/records.
    """
    import yaml

    experiment = ROOT / "experiments" / "gpu.yaml"
    if options.reduced:
        yield LeftOut("long: seeds 1 and 2, and all steps but 2 of a run", "they need a GPU")
        experiment = options.out / "one-seed.yaml"
        content = yaml.safe_load((ROOT / "experiments" / "gpu.yaml").read_text())
        experiment.write_text(yaml.safe_dump(content | {"seeds": [0]}, sort_keys=False))
    where = ["--out", str(options.out / "long"), "--pool", str(options.out / "pool")]
    where += ["--records", str(options.out / "long" / "records")]
    arguments = [*REMOE, "compare", str(experiment), *where]
    if options.reduced:
        base = {"preset": "tiny", "dtype": "float32", "steps": 2, "batch_size": 4, "micro_batch_size": 4}
        base |= {"validate.every": 2, "checkpoint.every": 2, "validate.max_tokens": 1000}
        arguments += ["--base", *(str(word) for pair in base.items() for word in pair)]
        yield Command("long", [*arguments, "--device", "cpu"], 500)
    else:
        yield Command("long", [*arguments, "--device", "cuda", "--workers", "6"], 500)


def bench(options: Options, kind: str, *arguments: str, name: str) -> list[str]:
    """The command of a benchmark."""
    device = [] if kind == "train-step" else ["--device", "cpu" if options.reduced else "cuda"]
    return [*REMOE, "bench", kind, *device, *arguments, "--out", str(options.out / f"{name}.json")]


def sizes_of(options: Options) -> list[str]:
    """Options of a benchmark of layers."""
    return ["--quick", "--repetitions", "1"] if options.reduced else []


def backends(options: Options) -> list[str]:
    """The option that names all backends that can run here in bfloat16; prints why the others cannot."""
    if options.reduced:
        return []
    # In a process of its own: some are slow to ask.
    asked = subprocess.run([sys.executable, "-c", ABLE], capture_output=True, text=True, timeout=60, check=True)
    lines = asked.stdout.splitlines()
    print(*(line for line in lines if line.startswith("#")), sep="\n", flush=True)
    able = [name for name in lines if name and name[0] != "#" and name not in ("naive", "cpu", "sonic")]
    return ["--backends", *able]


def run(command: Command, folder: Path, limit: int) -> dict[str, object]:
    """Runs one command for at most so many seconds; returns its line of the summary."""
    start = time.perf_counter()
    with open(folder / f"{command.name}.log", "w") as log:
        process = subprocess.Popen(command.arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = f"over {limit} s"
            process.terminate()  # training saves a checkpoint
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers, which would keep the GPU busy
            process.wait()
    seconds, words = round(time.perf_counter() - start, 1), " ".join(command.arguments)
    for place, name in ((str(folder), "FOLDER"), (f"{ROOT}/", ""), (sys.executable, "python")):
        words = words.replace(place, name)
    return {"command": command.name, "exit": code, "seconds": seconds, "arguments": words}


def main() -> None:
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"gpu_suite: not installed here: {', '.join(lacking)}")
    import torch
    import tyro

    from remoe.lab.machine import machine, pick_device

    options = tyro.cli(Options)
    if not (options.reduced or torch.cuda.is_available()):
        sys.exit("gpu_suite: no CUDA device here; --reduced runs the parts in small on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    file, lines = options.out / "summary.json", []
    summary = json.loads(file.read_text()) if file.exists() else {"commands": {}, "left_out": {}}
    summary["reduced"] = options.reduced
    for item in items(options):
        if isinstance(item, LeftOut):
            summary["left_out"][item.name] = item.why
        else:
            lines.append(run(item, options.out, SLOWER * item.limit if options.reduced else item.limit))
            summary["commands"][item.name] = lines[-1]
        file.write_text(json.dumps(summary, indent=2) + "\n")
    summary["machine"] = machine(pick_device("cpu" if options.reduced else "cuda"))
    file.write_text(json.dumps(summary, indent=2) + "\n")
    for line in lines:
        print(f"== {line['command']}: exit {line['exit']}, {line['seconds']} s")
        print((options.out / f"{line['command']}.log").read_text()[-4000:])
    sys.exit(any(line["exit"] != 0 for line in lines))


if __name__ == "__main__":
    main()
