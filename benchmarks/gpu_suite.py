"""Every GPU test and measurement, in parts of less than 9 minutes. Needs CUDA and no network.

    python benchmarks/gpu_suite.py --out FOLDER --parts tests layer decode
    python benchmarks/gpu_suite.py --out FOLDER --parts train-step

Each command of a part runs in a process of its own with a limit of seconds, writes its log and JSON into the folder,
and does not stop the others when it fails; benchmarks write what they have after each case. The exit code is 1 when a
command failed. `--parts long` goes on with its runs where the last call stopped.

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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "accelerate", "tyro", "pydantic", "yaml", "rich", "pyarrow", "pytest", "remoe")
PARTS = ("tests", "train-step", "decode", "sonic", "layer", "long")
Part = Literal[PARTS]
SLOWER = 5  # a CPU may take so many times as long as the limits say
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


def commands(options: Options) -> Iterator[Command]:
    """The commands of the parts; the limits of a part sum to less than 9 minutes."""
    made = {
        "tests": tests,
        "train-step": train_steps,
        "decode": decode,
        "sonic": sonic,
        "layer": layers,
        "long": long_runs,
    }
    for part in options.parts:
        yield from made[part](options)


def tests(options: Options) -> Iterator[Command]:
    """The tests that need a GPU; without one they are skipped."""
    yield Command("tests", [*TESTS, "-n", "1" if options.reduced else "8"], 150)


def train_steps(options: Options) -> Iterator[Command]:
    """Whole training steps, with torch.compile and without."""
    for experts in (8, 32):
        for compiled in (False, True):
            name = f"train-step-{experts}{'-compiled' if compiled else ''}"
            sizes = ["--preset", "182m", "--batch-size", "64", "--steps", "5"]
            if options.reduced:
                sizes = ["--preset", "tiny", "--batch-size", "16", "--settle", "2", "--rounds", "1", "--steps", "1"]
            arguments = [*sizes, "--num-experts", str(experts), *(["--compile"] if compiled else [])]
            arguments += ["--contestants", "remoe relu", "remoe topk", "remoe dense"]
            yield Command(name, bench(options, "train-step", *arguments, name=name), 130)


def decode(options: Options) -> Iterator[Command]:
    """A layer on few tokens, by every backend that can run here, and the writing of text with each KV cache."""
    yield Command("decode", bench(options, "decode", *sizes_of(options), *backends(options), name="decode"), 60)
    small = ["--d-model", "64", "--d-ffn", "32", "--vocab-size", "512", "--quick"] if options.reduced else []
    for cache in ("dynamic", "static"):
        name = f"generate-{cache}"
        yield Command(name, bench(options, "generate", "--cache", cache, *small, name=name), 180)


def sonic(options: Options) -> Iterator[Command]:
    """The backend of sonic-moe, in one process, so that what it compiles in its first call is there for all cases."""
    if options.reduced:
        print("sonic: left out, its kernels are for GPUs", flush=True)
    else:
        arguments = ["--backends", "sonic", "--no-peers", "--no-compiled"]
        yield Command("sonic", bench(options, "layer", *arguments, name="sonic"), 480)


def layers(options: Options) -> Iterator[Command]:
    """A layer forward and backward: by every backend, for several numbers of experts, and with other tiles."""
    small = sizes_of(options)
    yield Command("layer", bench(options, "layer", *small, *backends(options), name="layer"), 240)
    yield Command("experts", bench(options, "layer", "--cases", "experts", "--no-peers", *small, name="experts"), 90)
    if options.reduced:
        print("tiles: left out, the kernels of Triton are for GPUs", flush=True)
    else:
        tiles = [sys.executable, str(ROOT / "benchmarks" / "tune_tiles.py"), "--out", str(options.out / "tiles.json")]
        yield Command("tiles", tiles, 65)


def long_runs(options: Options) -> Iterator[Command]:
    """Runs over 300 million tokens, several at a time; what is finished stays, and the same call goes on."""
    where = ["--out", str(options.out / "long"), "--pool", str(options.out / "pool")]
    arguments = [*REMOE, "compare", str(ROOT / "experiments" / "gpu.yaml"), *where]
    if options.reduced:
        base = {"preset": "tiny", "dtype": "float32", "steps": 2, "batch_size": 4, "micro_batch_size": 4}
        base |= {"validate.every": 2, "checkpoint.every": 2, "validate.max_tokens": 1000}
        arguments += ["--base", *(str(word) for pair in base.items() for word in pair)]
        yield Command("long", arguments, 530)
    else:
        yield Command("long", [*arguments, "--device", "cuda", "--workers", "6"], 530)


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
            os.killpg(process.pid, signal.SIGKILL)  # with its workers, which would keep the GPU busy
            process.wait()
    return {"command": command.name, "exit": code, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"gpu_suite: not installed here: {', '.join(lacking)}")
    import torch
    import tyro

    options = tyro.cli(Options)
    if not (options.reduced or torch.cuda.is_available()):
        sys.exit("gpu_suite: no CUDA device here; --reduced runs the parts in small on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    summary = []
    for command in commands(options):
        limit = SLOWER * command.limit if options.reduced else command.limit
        summary.append(run(command, options.out, limit))
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    where = "a CPU, in small" if options.reduced else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}")
    for line in summary:
        print(f"== {line['command']}: exit {line['exit']}, {line['seconds']} s")
        print((options.out / f"{line['command']}.log").read_text()[-4000:])
    sys.exit(any(line["exit"] != 0 for line in summary))


if __name__ == "__main__":
    main()
