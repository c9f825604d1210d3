"""A TopK model of `remoe train` made ReLU and fine-tuned, beside the same model trained on as TopK for as long.

    remoe data prepare CORPUS/train --validation CORPUS/validation --out DATA
    remoe train --data DATA --preset mini --router topk --out RUN
    python examples/relufy_topk.py RUN DATA

Prints a line for each and writes OUT/result.json. Needs `pip install -e '.[bench]'`.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from fine_tuning import Windows, fine_tune, validation_loss

import remoe
from remoe.lab.data import open_dataset
from remoe.lab.data.batches import TrainBatches, ValidationWindows
from remoe.lab.machine import machine
from remoe.lab.training.load import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/relufy"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--eval-tokens", type=int, default=16384, help="validation tokens of each domain")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    topk, *_ = load_run(args.run)
    dataset = open_dataset(args.data)
    # In another order than the run's own, whose seed is 0.
    train = Windows(TrainBatches(dataset.train, args.length, 1, seed=1000), args.steps * args.batch)
    windows = ValidationWindows(dataset.validation, args.length)
    samples = [torch.stack([train[i * args.batch + j]["input_ids"] for j in range(args.batch)]) for i in range(4)]
    relu = copy.deepcopy(topk)
    report = remoe.relufy(relu, samples)
    print(report)

    result = {"steps": args.steps, "tokens": args.steps * args.batch * args.length, "conversion": vars(report)}
    for name, model in (("topk", topk), ("relu", relu)):
        before = validation_loss(model, windows, args.eval_tokens)
        log = fine_tune(
            model,
            train,
            args.out,
            steps=args.steps,
            batch=args.batch,
            learning_rate=args.learning_rate,
            callbacks=[remoe.SparsityCallback()],
        )
        after = validation_loss(model, windows, args.eval_tokens)
        sparsity = model.sparsity.sparsity.item()
        result[name] = {"loss_before": before, "loss_after": after, "sparsity": sparsity, "log": log}
        print(f"{name}: validation loss {before:.4f} before, {after:.4f} after {args.steps} steps, S = {sparsity:.3f}")
    result["machine"] = machine(model.device)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
