"""An independent reference in float64: the paper's formulas in plain loops, sharing no code with the package.

Legend: T tokens, D model width, F expert width, E experts, L layers.
"""

import math

import torch
from torch import Tensor


def relu_gates(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """Eq. 5, entry by entry."""
    rows = []
    for x_D in x_TD:
        rows.append(torch.stack([torch.clamp((x_D * w_D).sum(), min=0) for w_D in router_ED]))
    return torch.stack(rows)


def topk_gates(x_TD: Tensor, router_ED: Tensor, k: int) -> Tensor:
    """Softmax over all experts, then everything but the k largest set to zero; no renormalisation."""
    rows = []
    for x_D in x_TD:
        scores = torch.stack([(x_D * w_D).sum() for w_D in router_ED])
        probs = scores.exp() / scores.exp().sum()
        kept = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:k]
        rows.append(torch.stack([probs[e] if e in kept else probs[e] * 0 for e in range(len(probs))]))
    return torch.stack(rows)


def expert(x_D: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """One SwiGLU network on one token."""
    width = down_DF.shape[1]
    gate_F, up_F = gate_up_2FD[:width] @ x_D, gate_up_2FD[width:] @ x_D
    return down_DF @ (gate_F / (1 + torch.exp(-gate_F)) * up_F)


def layer(x_TD: Tensor, gate_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """y_t = sum_e R(x_t)_e FFN_e(x_t), over experts with a gate above zero."""
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for e in range(gate_TE.shape[1]):
            if gate_TE[t, e] > 0:
                y_D = y_D + gate_TE[t, e] * expert(x_TD[t], gate_up_E2FD[e], down_EDF[e])
        rows.append(y_D)
    return torch.stack(rows)


def l1(gate_TE: Tensor) -> Tensor:
    """Eq. 9 for one layer."""
    return sum(gate_TE[t, e] for t in range(gate_TE.shape[0]) for e in range(gate_TE.shape[1])) / gate_TE.shape[0]


def balanced_l1(gate_TE: Tensor, k: int) -> Tensor:
    """Eq. 10 and 11 for one layer."""
    T, E = gate_TE.shape
    total = torch.zeros((), dtype=gate_TE.dtype)
    for e in range(E):
        active = sum(1 for t in range(T) if gate_TE[t, e] > 0)
        f = E / (k * T) * active
        total = total + sum(f * gate_TE[t, e] for t in range(T)) / T
    return total


def switch(prob_TE: Tensor, gate_TE: Tensor, k: int) -> Tensor:
    """E * sum_e f_e P_e, with f_e the share of all T k choices and P_e the mean probability."""
    T, E = prob_TE.shape
    total = torch.zeros((), dtype=prob_TE.dtype)
    for e in range(E):
        chosen = sum(1 for t in range(T) if gate_TE[t, e] > 0)
        total = total + (chosen / (k * T)) * prob_TE[:, e].mean()
    return E * total


def lambda_course(sparsities: list[float], target: float, start: float = 1e-8, alpha: float = 1.2) -> list[float]:
    """Eq. 7 step by step: lambda after each S."""
    course, value = [], start
    for sparsity in sparsities:
        sign = 0 if sparsity == target else math.copysign(1, target - sparsity)
        value *= alpha**sign
        course.append(value)
    return course


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Frobenius norm; absolute where the expected value is zero."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return difference / scale if scale > 0 else difference
