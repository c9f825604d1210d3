"""Measures how many routed pairs change when a trained model runs in bfloat16, or with int8 weights.

    remoe train --preset tiny --router relu --steps 150 --seed SEED --out RELU
    remoe train --preset tiny --router topk --steps 150 --seed SEED --out TOPK
    python experiments/routing_precision.py RELU TOPK --out experiments/results/routing-precision.json

Every model reads the same validation tokens. The reference is its own float32 pass. Runs of other seeds that the file
has already stay in it; the summary is over all seeds of a router.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

import remoe
from remoe.lab.analysis.collect import gates_of
from remoe.lab.analysis.texts import PreparedText
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.machine import machine
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_model
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing.replay import disagreement

PRECISIONS: dict[str, Callable[[RemoeForCausalLM], RemoeForCausalLM]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "int8": remoe.quantize,
    "int8, bfloat16": lambda model: remoe.quantize(model.to(torch.bfloat16)),
}


SHARES = (
    "share of pairs that differ",
    "share of tokens with a pair that differs",
    "share of the gates' sum in pairs that differ",
)


def gates_by_layer(model: RemoeForCausalLM, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(L, T, E) float32, the gates of all batches; no gate of an executed pair is zero in these models."""
    return torch.cat([gates_of(model.eval(), input_NS, mask_NS) for input_NS, mask_NS in batches], dim=1)


def measure(run: Path, max_tokens: int) -> dict:
    """Disagreement of one run with itself in other precisions."""
    options = RunFolder(run).load_config()
    windows = ValidationWindows(open_dataset(options.data).validation, options.seq_len)
    batches = [(batch.input_NS, batch.mask_NS) for batch in PreparedText(windows, max_tokens).batches(8)]
    reference_LTE = gates_by_layer(load_model(run)[0].float(), batches)
    active_LTE = reference_LTE != 0
    L, T, _ = active_LTE.shape
    result = {
        "router": options.router,
        "seed": options.seed,
        "steps": options.steps,
        "tokens": T,
        "active experts per token": float(active_LTE.sum() / (L * T)),
    }
    for name, change in PRECISIONS.items():
        gate_LTE = gates_by_layer(change(load_model(run)[0].float()), batches)
        differs_LTE = active_LTE != (gate_LTE != 0)
        share_L = disagreement(list(active_LTE), list(gate_LTE != 0))
        both_LTE = reference_LTE + gate_LTE
        tokens = differs_LTE.any(dim=2).any(dim=0).float().mean()
        shares = share_L.mean(), tokens, both_LTE[differs_LTE].sum() / both_LTE.sum()
        result[name] = {
            "share of pairs that differ, by layer": share_L.tolist(),
            **{share: float(value) for share, value in zip(SHARES, shares, strict=True)},
        }
    return result


def summary(runs: list[dict]) -> dict:
    """By router and precision: mean and standard deviation over the seeds."""
    result = {}
    for router in dict.fromkeys(run["router"] for run in runs):
        ours = [run for run in runs if run["router"] == router]
        result[router] = {"seeds": [run["seed"] for run in ours]}
        for name in PRECISIONS:
            values = {share: [run[name][share] for run in ours] for share in SHARES}
            result[router][name] = {
                share: {"mean": mean(found), "deviation": stdev(found) if len(found) > 1 else None}
                for share, found in values.items()
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    before = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    runs = {
        (run["router"], run["seed"]): run for run in (*before, *(measure(one, args.max_tokens) for one in args.runs))
    }
    ordered = [runs[key] for key in sorted(runs)]
    results = {"machine": machine(torch.device("cpu")), "summary": summary(ordered), "runs": ordered}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
