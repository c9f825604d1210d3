"""Every GPU test and benchmark, in under 8 minutes, with one summary at the end. Needs CUDA and no network.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu

Each part runs in a process of its own with a limit of seconds, writes its log and JSON into the folder, and does not
stop the others when it fails. The exit code is 1 when a part failed.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from remoe.experts import BACKENDS, resolve_backend

TESTS = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# One process, and nothing that a machine without network may lack.
TESTS += ["-o", "addopts=--import-mode=importlib"]
BENCH = [sys.executable, "-m", "remoe.cli.main", "bench"]


@dataclass
class Options:
    """Run the GPU suite."""

    out: Path
    """Folder for logs and JSON."""


def able_backends() -> list[str]:
    """Backends that can run here in bfloat16; prints why the others cannot."""
    able = []
    for name in BACKENDS:
        try:
            resolve_backend(name, "cuda", torch.bfloat16, 2048, 1408)
            able.append(name)
        except ValueError as error:
            print(error)
    return [name for name in able if name not in ("naive", "loop")]


def parts(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, limit in seconds) in the order of importance."""
    tests = Path(__file__).resolve().parent.parent / "tests"
    backends = ["--backends", *able_backends()]
    return [
        ("tests", [*TESTS, str(tests / "gpu")], 150),
        ("layer", [*BENCH, "layer", "--device", "cuda", *backends, "--out", str(out / "layer.json")], 150),
        ("decode", [*BENCH, "decode", "--device", "cuda", *backends, "--out", str(out / "decode.json")], 60),
        (
            "experts",
            [*BENCH, "layer", "--device", "cuda", "--cases", "experts", "--out", str(out / "experts.json")],
            60,
        ),
    ]


def main() -> None:
    options = tyro.cli(Options)
    if not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device here")
    options.out.mkdir(parents=True, exist_ok=True)
    summary = []
    for name, command, limit in parts(options.out):
        start = time.perf_counter()
        with open(options.out / f"{name}.log", "w") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                code = f"over {limit} s"
        summary.append({"part": name, "exit": code, "seconds": round(time.perf_counter() - start, 1)})
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part in summary:
        print(f"== {part['part']}: exit {part['exit']}, {part['seconds']} s")
        print((options.out / f"{part['part']}.log").read_text()[-4000:])
    sys.exit(any(part["exit"] != 0 for part in summary))


if __name__ == "__main__":
    main()
