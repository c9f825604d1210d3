"""AdamW and its learning rate, a pure function of the step."""

import math

import torch
from torch import nn

from remoe.lab.training.config import OptimOptions


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """Fused AdamW with weight decay for matrices but not for vectors (norms); set the learning rate at each step."""
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for p in sorted(model.parameters(), key=lambda p: p.ndim < 2):
        if p.requires_grad:  # the fused update takes shards of one mesh only
            groups.setdefault((p.ndim >= 2, getattr(p, "device_mesh", None)), []).append(p)
    decayed = [
        {"params": group, "weight_decay": options.weight_decay if matrices else 0.0}
        for (matrices, _), group in groups.items()
    ]
    return torch.optim.AdamW(decayed, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)


def learning_rate(step: int, steps: int, options: OptimOptions) -> float:
    """Linear warm-up, then cosine decay to `final_lr_ratio` of the peak.

    Args:
        step: 1 for the first optimiser step, `steps` for the last.
        steps: of the whole run.
        options: peak, warm-up and final ratio.
    """
    warmup = max(1, round(options.warmup_ratio * steps))
    if step <= warmup:
        return options.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = options.final_lr_ratio
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
