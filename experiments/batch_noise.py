"""How far S of small batches is from S of the model that computes them, while no weight changes.

    python experiments/batch_noise.py DATA --out experiments/results/batch-noise.json

DATA is a folder that `remoe data prepare` wrote, with a vocabulary of 512 tokens. A run of 5000 steps of 128 tokens is
left after 300 and after 800 steps, and its next 2600 batches are only routed. What their means of 50 and of 200 deviate
from the mean of all is no rule's doing, and no rule could prevent it.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch

from remoe.lab.data import Dataset, open_dataset
from remoe.lab.data.batches import TrainBatches
from remoe.lab.machine import machine
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.trainer import Trainer
from remoe.models.modes import evaluating

SEQ_LEN, LENGTH, LEFT_AFTER = 128, 5000, (300, 800)
BATCHES, RUN = 2600, 650  # of a run that settles at step 150 and is left at 800, as in benchmarks/sparsity_grid.py
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def routed(trainer: Trainer, dataset: Dataset) -> torch.Tensor:
    """S of each of the next batches, (BATCHES,) float64."""
    config, S = trainer.config, []
    batches = TrainBatches(dataset.train, SEQ_LEN, 1, seed=config.seed)
    with evaluating(trainer.model), torch.no_grad():
        for step in range(trainer.step, trainer.step + BATCHES):
            routings = trainer.model(batches.batch(step)[:, :-1], use_cache=False).routings
            pairs = sum(routing.count_E.sum().item() for routing in routings)
            S.append(1 - pairs / (SEQ_LEN * config.num_experts * len(routings)))
    return torch.tensor(S, dtype=torch.float64)


def figures(S: torch.Tensor) -> dict[str, object]:
    """Spread of single batches, and the largest deviation of means of `window` batches in each part of RUN batches."""
    error = S - S.mean()
    found = {"S": round(S.mean().item(), 4), "std": round(error.std().item(), 4)}
    for window in (50, 200):
        means = [part.unfold(0, window, 1).mean(dim=1).abs().max().item() for part in error.split(RUN)]
        found[f"largest_deviation_of_{window}"] = [round(value, 4) for value in means]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="prepared data")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    dataset, rows = open_dataset(options.data), []
    for experts, seed in product((4, 8, 32), (0, 1)):
        sizes = {"seq_len": SEQ_LEN, "batch_size": 1, "micro_batch_size": 1, "num_experts": experts, "model": MODEL}
        config = config_from_dict({"steps": LENGTH, "seed": seed, **sizes}, "test")
        trainer = Trainer(config, dataset, RunFolder("none"))
        progress = ProgressLine(config, 0)
        for steps in LEFT_AFTER:
            while trainer.step < steps:
                trainer._train_step(progress)
            rows.append({"experts": experts, "seed": seed, "steps": steps, **figures(routed(trainer, dataset))})
            print(rows[-1], flush=True)
    options.out.write_text(json.dumps({"machine": machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
