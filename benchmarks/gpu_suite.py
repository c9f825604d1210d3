"""Every GPU test and benchmark, in under 8 minutes, with one summary at the end. Needs CUDA and no network.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu

Each part runs in a process of its own with a limit of seconds, writes its log and JSON into the folder, and does not
stop the others when it fails; benchmarks write what they have after each case. The exit code is 1 when a part failed.

On a machine without network, packages that it lacks travel as wheels (`pip download --no-deps` elsewhere, `pip install
--no-index --target DIR` there) and this one as its source: `PYTHONPATH=DIR:src`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "triton", "transformers", "tyro", "pydantic", "yaml", "rich", "pyarrow", "pytest", "remoe")
# Tests in several processes, which compile kernels side by side; a kernel that fails takes down its own process alone.
TESTS = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-n", "8", "--dist", "worksteal"]
TESTS += ["-o", "addopts=--import-mode=importlib"]
BENCH = [sys.executable, "-m", "remoe.lab.cli.main", "bench"]
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


def able_backends() -> list[str]:
    """Backends that can run here in bfloat16; prints why the others cannot. In a process of its own: some are slow."""
    asked = subprocess.run([sys.executable, "-c", ABLE], capture_output=True, text=True, timeout=60, check=True)
    lines = asked.stdout.split("\n")
    print(*(line for line in lines if line.startswith("#")), sep="\n")
    return [name for name in lines if name and name[0] != "#" and name not in ("naive", "cpu")]


def parts(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, limit in seconds) in the order of importance; the limits sum to less than 8 minutes."""
    root = Path(__file__).resolve().parent
    backends = ["--backends", *able_backends()]

    def bench(kind: str, *flags: str, name: str) -> list[str]:
        return [*BENCH, kind, "--device", "cuda", *flags, "--out", str(out / f"{name}.json")]

    return [
        ("tests", [*TESTS, str(root.parent / "tests" / "gpu")], 150),
        ("layer", bench("layer", *backends, name="layer"), 180),
        ("experts", bench("layer", "--cases", "experts", "--no-peers", name="experts"), 40),
        ("decode", bench("decode", *backends, name="decode"), 40),
        ("tiles", [sys.executable, str(root / "tune_tiles.py"), "--out", str(out / "tiles.json")], 65),
    ]


def main() -> None:
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"gpu_suite: not installed here: {', '.join(lacking)}")
    import torch
    import tyro

    options = tyro.cli(Options)
    if not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device here")
    options.out.mkdir(parents=True, exist_ok=True)
    summary = []
    for name, command, limit in parts(options.out):
        start = time.perf_counter()
        with open(options.out / f"{name}.log", "w") as log:
            part = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = part.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = f"over {limit} s"
                os.killpg(part.pid, signal.SIGKILL)  # with its workers, which would keep the GPU busy
                part.wait()
        summary.append({"part": name, "exit": code, "seconds": round(time.perf_counter() - start, 1)})
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part in summary:
        print(f"== {part['part']}: exit {part['exit']}, {part['seconds']} s")
        print((options.out / f"{part['part']}.log").read_text()[-4000:])
    sys.exit(any(part["exit"] != 0 for part in summary))


if __name__ == "__main__":
    main()
