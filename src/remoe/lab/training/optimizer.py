"""The optimiser and its learning rate, a pure function of the step."""

import math

import torch
from torch import nn

from remoe.lab.training.config import OptimOptions
from remoe.lab.training.muon import Muon, hidden_matrices


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon for the matrices between embeddings and head; set the learning rate at each step.

    Weight decay is for matrices but not for vectors (norms).
    """
    matrices = hidden_matrices(model) if options.name == "muon" else []
    apart = {id(parameter) for parameter in matrices}
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for p in sorted(model.parameters(), key=lambda p: p.ndim < 2):
        if p.requires_grad and id(p) not in apart:  # the fused update takes shards of one mesh only
            groups.setdefault((p.ndim >= 2, getattr(p, "device_mesh", None)), []).append(p)
    decayed = [
        {"params": group, "weight_decay": options.weight_decay if wide else 0.0} for (wide, _), group in groups.items()
    ]
    settings = {"lr": options.lr, "betas": (options.beta1, options.beta2), "fused": True}
    if options.name == "muon":
        return Muon(matrices, decayed, options.weight_decay, **settings)
    return torch.optim.AdamW(decayed, **settings)


def learning_rate(step: int, steps: int, options: OptimOptions) -> float:
    """Linear warm-up; then by the schedule to `final_lr_ratio` of the peak at the last step.

    Args:
        step: 1 for the first optimiser step, `steps` for the last.
        steps: of the whole run.
        options: peak, warm-up, schedule and final ratio.
    """
    warmup, floor = max(1, warmup_steps(steps, options)), options.final_lr_ratio
    if step <= warmup:
        return options.lr * step / warmup
    if options.schedule == "wsd":
        begin = max(warmup, stable_end(steps, options))
        fallen = max(0, step - begin) / max(1, steps - begin)
        return options.lr * (1 - (1 - floor) * fallen)
    progress = (step - warmup) / max(1, steps - warmup)
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_steps(steps: int, options: OptimOptions) -> int:
    """Steps over which the learning rate rises, of a run of so many."""
    return round(options.warmup_ratio * steps) if options.warmup_steps is None else options.warmup_steps


def stable_end(steps: int, options: OptimOptions) -> int:
    """With the schedule 'wsd', the last step of a run of so many that has the whole learning rate after its warm-up."""
    return steps - round(options.decay_ratio * steps)
