"""The README's figures: `remoe train` with each router and seed, one after the other, and a table of the results.

    python benchmarks/default_run.py --out runs/default --results benchmarks/results/NAME.json

Finished runs are not repeated, so the script can be stopped and started again.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from remoe.lab.machine import machine, pick_device


@dataclass
class Options:
    """Compare routers at the default run."""

    out: Path
    """Folder of the runs."""
    results: Path
    """JSON file to write."""
    routers: tuple[str, ...] = ("relu", "topk", "dense")
    """Routers to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each."""


def summary_of(folder: Path, flags: list[str]) -> dict:
    """The summary of a run, trained first unless it is there."""
    path = folder / "summary.json"
    if not path.exists():
        resume = ["--resume"] if (folder / "config.yaml").exists() else []
        subprocess.run(
            [sys.executable, "-m", "remoe.lab.cli.main", "train", "--out", str(folder), *flags, *resume], check=True
        )
    return json.loads(path.read_text())


def main() -> None:
    options = tyro.cli(Options)
    keys = ("validation_loss", "seconds", "final_sparsity", "settling_step", "sparsity_mean", "sparsity_deviation")
    runs = []
    for seed in options.seeds:
        for router in options.routers:
            flags = ["--router", router, "--seed", str(seed)]
            summary = summary_of(options.out / f"{router}-seed{seed}", flags)
            validation = {domain: row["loss"] for domain, row in summary["validation"].items()}
            runs.append(
                {
                    "command": " ".join(["remoe train", *flags]),
                    "router": router,
                    "seed": seed,
                    **{key: summary[key] for key in keys},
                    "validation": validation,
                }
            )
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps({"machine": machine(pick_device("auto")), "runs": runs}, indent=2))
    print("| router | validation loss, mean | deviation | minutes |")
    print("|---|---|---|---|")
    for router in options.routers:
        losses = [run["validation_loss"] for run in runs if run["router"] == router]
        minutes = statistics.mean(run["seconds"] for run in runs if run["router"] == router) / 60
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"| {router} | {statistics.mean(losses):.4f} | {deviation:.4f} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
