"""What the smooth rule could do at 128 tokens and E = 4 if it knew S of the model instead of S of the batch.

    python experiments/known_sparsity.py DATA --out experiments/results/known-sparsity.json

DATA is a folder that `remoe data prepare` wrote, with a vocabulary of 512 tokens. Before each update, S is measured on
64 other training windows at the current weights, 8192 tokens. The rule gets this S, or that of the batch as always.
Runs that the file has are not computed again.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

from remoe import sparsity
from remoe.lab.data import Dataset, open_dataset
from remoe.lab.data.batches import TrainBatches
from remoe.lab.machine import machine
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.trainer import Trainer
from remoe.models.modes import evaluating
from remoe.stages import settled_within

EXPERTS, SEQ_LEN, LENGTH, STEPS, WINDOW, MEASURED = 4, 128, 5000, 800, 50, 64
GAINS = {  # of the rule, as in remoe/sparsity.py
    "as it is": {"SMOOTH_GAIN_CLOSED": sparsity.SMOOTH_GAIN_CLOSED},
    "stronger": {"SMOOTH_OPENING": 1.0, "SMOOTH_SPARSER": 0.0, "SMOOTH_GAIN_CLOSED": 0.9},
    "strongest": {
        "SMOOTH_OPENING": 3.0,
        "SMOOTH_SPARSER": 0.0,
        "SMOOTH_GAIN": 1.8,
        "SMOOTH_GAIN_CLOSED": 1.8,
        "SMOOTH_DAMPING": 9.0,
        "SMOOTH_AVERAGE": 0.6,
    },
}


def course(dataset: Dataset, seed: int, known: bool) -> tuple[list[float], list[float], float]:
    """S of the model and of the batch at each step, and the mean loss of the last steps."""
    model = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    sizes = {"seq_len": SEQ_LEN, "batch_size": 1, "micro_batch_size": 1, "num_experts": EXPERTS}
    trainer = Trainer(config_from_dict({"steps": LENGTH, "seed": seed, **sizes, "model": model}, "test"), dataset,
                      RunFolder("none"))  # fmt: skip
    ids = TrainBatches(dataset.train, SEQ_LEN, MEASURED, seed=999).batch(0)[:, :-1]
    of_model, of_batch, losses = [], [], []
    factor = sparsity.SparsityController._factor

    def informed(controller, S, lr_fraction):
        with evaluating(trainer.model), torch.no_grad():
            routings = trainer.model(ids, use_cache=False).routings
        pairs = sum(routing.count_E.sum() for routing in routings)
        measured = 1 - pairs.double() / (ids.numel() * EXPERTS * len(routings))
        of_model.append(measured.item())
        of_batch.append(S.item())
        return factor(controller, measured if known else S, lr_fraction)

    progress = ProgressLine(trainer.config, 0)
    with patch.object(sparsity.SparsityController, "_factor", informed):
        for _ in range(STEPS):
            losses.append(trainer._train_step(progress)["lm_loss"])
    return of_model, of_batch, sum(losses[-WINDOW:]) / WINDOW


def figures(of_model: list[float], of_batch: list[float], loss: float) -> dict[str, float]:
    """From the first step at which the mean S of the model over WINDOW steps is near the target."""
    target = 1 - 1 / EXPERTS
    S, batch_S = (torch.tensor(values, dtype=torch.float64) for values in (of_model, of_batch))
    error = (S.unfold(0, WINDOW, 1).mean(dim=1) - target).abs()
    first = (error <= settled_within(target)).nonzero()[0].item()
    after = slice(first + WINDOW, None)
    return {
        "settled_at": first + WINDOW,
        "largest_deviation": round(error[first:].max().item(), 4),
        "deviation_of_batches": round((batch_S - S)[after].std().item(), 4),
        "lm_loss": round(loss, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="prepared data")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["gains"], row["known"], row["seed"]) for row in rows}
    for name, known, seed in product(GAINS, (False, True), (0, 1)):
        if (name, known, seed) in done:
            continue
        with patch.multiple(sparsity, **GAINS[name]):
            found = figures(*course(dataset, seed, known))
        rows.append({"gains": name, "known": known, "seed": seed, **found})
        print(rows[-1], flush=True)
        options.out.write_text(json.dumps({"machine": machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
