"""How well lambda's smooth rule holds S: the first part of runs of several lengths, batches and numbers of experts.

    python benchmarks/sparsity_grid.py --data DATA --out experiments/results/sparsity-control.csv

DATA is a folder that `remoe data prepare` wrote; a vocabulary of 512 tokens keeps it quick. Rows that the file has are
not computed again, so the script can be stopped and started again.

The rows of sparsity-control.csv are those of three commands: `--sequences 1 --seeds 0 1 2 3`, `--sequences 16`, and
`--sequences 512 --lengths 200 --width 8 --layers 1`. Those of sparsity-whole-runs.csv are of `--sequences 1 --lengths
5000 --most-steps 5000`, with `--experts 4 --seeds 0 1 2 3` and with `--experts 8 --seeds 0 1`. Each process has one
thread (OMP_NUM_THREADS=1); two ran at a time.
"""

import csv
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from remoe.lab.data import Dataset, open_dataset
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.trainer import Trainer
from remoe.stages import settled_within

WINDOW, LONG_WINDOW = 50, 200  # steps over which S is averaged; see experiments/batch_noise.py for the longer one
SHOWN = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800)
COLUMNS = ("width", "layers", "batch_tokens", "experts", "length", "seed", "steps_run", "target", "settled_at")
COLUMNS += ("largest_deviation_after", "of_200_steps", "largest_lambda", "lm_loss", *(f"S_{step}" for step in SHOWN))


@dataclass
class Options:
    """Train the first part of each run of the grid and write S over the steps."""

    data: Path
    """Prepared data."""
    out: Path
    """CSV file to write."""
    experts: tuple[int, ...] = (4, 8, 32, 128)
    """Numbers of experts."""
    sequences: tuple[int, ...] = (1, 16, 512)
    """Sequences of 128 tokens in a batch."""
    lengths: tuple[int, ...] = (200, 500, 5000, 100_000)
    """Lengths of runs, in steps."""
    most_steps: int = 800
    """Steps of a run after which it is left."""
    width: int = 32
    """Width of the model; its experts are twice as wide."""
    layers: int = 2
    """Layers of the model."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one run for each."""


def course(dataset: Dataset, options: Options, experts: int, sequences: int, length: int, seed: int) -> list[dict]:
    """The records of the first steps of a run."""
    model = {
        "hidden_size": options.width,
        "intermediate_size": 2 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    sizes = {"seq_len": 128, "batch_size": sequences, "micro_batch_size": min(sequences, 64)}
    config = config_from_dict({"steps": length, "num_experts": experts, "seed": seed, **sizes, "model": model}, "grid")
    trainer = Trainer(config, dataset, RunFolder(Path(tempfile.gettempdir()) / "unused"))
    progress = ProgressLine(config, 0)
    return [trainer._train_step(progress) for _ in range(min(length, options.most_steps))]


def figures(records: list[dict], target: float) -> dict[str, object]:
    """What the table says of a run; S is the mean of the last WINDOW steps."""
    S = torch.tensor([record["sparsity"] for record in records], dtype=torch.float64)
    mean_S = S.unfold(0, WINDOW, 1).mean(dim=1)  # the first is that of step WINDOW
    near = ((mean_S - target).abs() <= settled_within(target)).nonzero()
    first = near[0].item() if len(near) else None
    long = (
        S[first:].unfold(0, LONG_WINDOW, 1).mean(dim=1) if first is not None and len(S) - first >= LONG_WINDOW else []
    )
    losses = [record["lm_loss"] for record in records[-WINDOW:]]
    return {
        "steps_run": len(records),
        "target": f"{target:.4f}",
        "settled_at": "" if first is None else first + WINDOW,
        "largest_deviation_after": "" if first is None else f"{(mean_S[first:] - target).abs().max():.4f}",
        "of_200_steps": f"{(long - target).abs().max():.4f}" if len(long) else "",
        "largest_lambda": f"{max(record['lambda'] for record in records):.1e}",
        "lm_loss": f"{sum(losses) / len(losses):.3f}",
        **{f"S_{step}": f"{mean_S[step - WINDOW]:.4f}" for step in SHOWN if step <= len(records)},
    }


def main() -> None:
    options = tyro.cli(Options)
    dataset = open_dataset(options.data)
    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    done = {tuple(int(row[name]) for name in COLUMNS[:6]) for row in rows}
    runs = itertools.product(options.sequences, options.experts, options.lengths, options.seeds)
    for sequences, experts, length, seed in runs:
        place = (options.width, options.layers, sequences * 128, experts, length, seed)
        if place in done:
            continue
        records = course(dataset, options, experts, sequences, length, seed)
        rows.append({**dict(zip(COLUMNS, place, strict=False)), **figures(records, 1 - 1 / experts)})
        print(rows[-1], flush=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
