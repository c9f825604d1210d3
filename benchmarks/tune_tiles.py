"""Times each product of the Triton kernels alone, with one tile after the other: the table TILES is chosen from this.

    python benchmarks/tune_tiles.py --out benchmarks/results/tiles.json

Every candidate is first compiled in one of several processes, then timed in this one, and its result compared with that
of the table's own tile. Needs CUDA; with TRITON_INTERPRET=1 and --cases tiny it runs, slowly and meaning nothing, on a
CPU. What is finished is written when the limit of seconds is reached.

Legend: T tokens, D model width, F expert width, E experts, W rows of a window.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from torch import Tensor

from remoe.experts.contract import Problem
from remoe.experts.triton.backend import Launcher
from remoe.experts.triton.launch import Tile, interpreted
from remoe.lab.bench.layer import CASES, Case
from remoe.lab.bench.timing import median_seconds
from remoe.lab.machine import machine
from remoe.routing.assignment import Assignment

CANDIDATES: dict[str, list[Tile]] = {
    "up": [Tile(256, 64, 8, 4, exact=True), Tile(256, 64, 8, 3, exact=True), Tile(128, 64, 8, 3, 2, 128)],
    "down": [Tile(256, 64, 8, 3), Tile(256, 64, 8, 4), Tile(128, 64, 4, 3, 2)],
    "hidden_gradient": [Tile(128, 64, 8, 3, 2, 128), Tile(256, 64, 8, 4, exact=True), Tile(128, 64, 4, 3, 2)],
    "rows_gradient": [Tile(256, 64, 8, 3), Tile(256, 64, 8, 4), Tile(128, 64, 4, 3, 2)],
    "gate_up_gradient": [
        Tile(128, 64, 8, 5, rows=256), Tile(256, 64, 8, 5), Tile(256, 64, 8, 7), Tile(128, 64, 8, 5, 2, 128),
    ],
    "down_gradient": [
        Tile(256, 64, 8, 5, exact=True), Tile(256, 64, 8, 7, exact=True), Tile(128, 64, 8, 5, 2, 128),
        Tile(128, 64, 8, 5, rows=256),
    ],
}  # fmt: skip
MATRICES = {
    "up": 2, "down": 1, "hidden_gradient": 1, "rows_gradient": 2, "gate_up_gradient": 2, "down_gradient": 1,
}  # fmt: skip
TINY = (Case(48, 32, 48, 3, 1),)
WORKERS = 12
COMPILING = 0.6  # the share of the time in which candidates must be compiled


@dataclass
class Options:
    """Compare tiles of the Triton kernels."""

    out: Path | None = None
    """JSON file for the figures."""
    cases: str = "cuda"
    """cuda: the sizes of `remoe bench layer`; tiny: a trial of this program."""
    seconds: float = 55
    """Limit; the candidates that remain are left out."""
    repetitions: int = 9
    """Timed rounds of each candidate."""


class Products:
    """All products of one layer whose pairs, k a token, fit in one window."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        T, D, F, E = case.T, case.D, case.F, case.E
        self.case = case

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        active_TE = torch.rand(T, E, device=device) < case.k / E
        pairs = Assignment.from_gates(torch.rand(T, E, device=device), active_TE)
        W = self.rows = int(pairs.count_E.sum())
        self.x, self.dy, self.gate_up, self.down = draw(T, D), draw(T, D), draw(E, 2 * F, D), draw(E, D, F)
        self.pre, self.hidden = draw(W, 2 * F), draw(W, F)
        lists = pairs.gate_N[:W].detach(), pairs.token_N[:W], pairs.count_E, None
        self.launch = Launcher(Problem(self.x, self.gate_up, self.down, *lists), [range(W)])

    def run(self, product: str, tile: Tile) -> list[Tensor]:
        """Runs one product by one tile; returns what it wrote."""
        launch, W = self.launch, self.rows
        tiles, launch.tiles = launch.tiles, replace(launch.tiles, **{product: tile})
        try:
            if product == "up":
                out = [torch.empty_like(self.pre), torch.empty_like(self.hidden)]
                launch.up_projection(0, self.x, self.gate_up, out[0], 0, W, out[1])
            elif product == "down":
                out = [self.x.new_empty(W, self.case.D)]
                launch.project(0, self.hidden, self.down, out[0])
            elif product == "rows_gradient":
                out = [self.x.new_empty(W, self.case.D)]
                launch.project(0, self.pre, self.gate_up, out[0], up=True)
            elif product == "hidden_gradient":
                scratch = [self.x.new_empty(launch.scratch_rows, t.shape[1]) for t in (self.pre, self.hidden)]
                launch.hidden_gradient(0, self.dy, self.down, self.pre, 0, *scratch, launch.gate_parts())
                out = [rows[:W] for rows in scratch]
            elif product == "gate_up_gradient":
                out = [torch.empty_like(self.gate_up)]
                launch.weight_gradient(0, self.pre, self.x, out[0], up=True)
            else:
                out = [torch.empty_like(self.down)]
                launch.weight_gradient(0, self.hidden, self.dy, out[0])
        finally:
            launch.tiles = tiles
        return out

    def flops(self, product: str) -> int:
        """Of one run."""
        return 2 * MATRICES[product] * self.rows * self.case.D * self.case.F


@lru_cache(1)  # of each process: the cases come one after the other
def problem(case: Case) -> Products:
    """The layer of a case."""
    device = torch.device("cpu" if interpreted() else "cuda")
    return Products(case, device, torch.float16 if interpreted() else torch.bfloat16)


def attempt(case: Case, product: str, tile: Tile) -> str | None:
    """Compiles and runs; says why where that fails."""
    try:
        problem(case).run(product, tile)
        if not interpreted():
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler raises: too much shared memory, for one
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def main() -> None:
    options = tyro.cli(Options)
    deadline = time.monotonic() + options.seconds
    cases = TINY if options.cases == "tiny" else CASES["cuda"]
    jobs = [(case, product, tile) for case in cases for product, tiles in CANDIDATES.items() for tile in tiles]
    facts = machine(torch.device("cpu" if interpreted() else "cuda"))
    pool = ProcessPoolExecutor(min(WORKERS, len(jobs)) if not interpreted() else 1, mp_context=get_context("spawn"))
    compiled = [pool.submit(attempt, *job) for job in jobs]
    # All of them first: no other process may use the device while one is timed.
    wait(compiled, timeout=COMPILING * options.seconds)
    pool.shutdown(cancel_futures=True)
    rows, left_out = [], 0
    for (case, product, tile), future in zip(jobs, compiled, strict=True):
        if future.cancelled() or time.monotonic() > deadline:
            left_out += 1
            continue
        figures = _measure(case, product, tile, future.result(), options.repetitions)
        rows.append({"case": str(case), "product": product, "tile": asdict(tile)} | figures)
        print(_line(rows[-1]), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
    if left_out:
        print(f"{left_out} candidates left out: {options.seconds:g} seconds are over")


def _measure(case: Case, product: str, tile: Tile, failure: str | None, repetitions: int) -> dict:
    if failure is not None:
        return {"failed": failure}
    layer = problem(case)
    own = layer.run(product, getattr(layer.launch.tiles, product))
    found = layer.run(product, tile)
    error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, own, strict=True))
    if not error < 1e-2:
        return {"failed": f"differs by {error:.1e} from the table's own tile"}
    seconds = median_seconds({"": lambda: layer.run(product, tile)}, layer.x.device, repetitions)[""]
    return {"microseconds": 1e6 * seconds, "tflops": layer.flops(product) / seconds / 1e12}


def _line(row: dict) -> str:
    tile = ", ".join(str(value) for value in row["tile"].values())
    result = row.get("failed") or f"{row['microseconds']:8.0f} us {row['tflops']:7.1f} TFLOP/s"
    return f"{row['case']:26} {row['product']:16} {tile:24} {result}"


if __name__ == "__main__":
    main()
