"""No routing: every token goes to the one expert with gate one. The dense baselines behind the same interface.

Legend: T tokens.
"""

from typing import Any

import torch
from torch import Tensor

from remoe.routing.assignment import Assignment, Routing, count_tokens
from remoe.routing.base import Router


class DenseRouter(Router):
    """Sends every token to the one network, as wide as k experts: the same active compute. No parameters."""

    routes_pairs = False
    has_logits = False

    def __init__(self, d_model: int, num_experts: int, k: int) -> None:
        super().__init__(d_model, 1, 1)

    @classmethod
    def networks(cls, num_experts: int, d_ffn: int, k: int) -> tuple[int, int]:
        return 1, k * d_ffn

    @classmethod
    def executed_experts(cls, num_experts: int, k: int, density: float, seq_len: int, **options: Any) -> float:
        return k

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        return one_expert(x_TD, mask_T)

    def extra_repr(self) -> str:
        return ""


class DenseWideRouter(DenseRouter):
    """The same with a network as wide as all E experts: the same parameters."""

    @classmethod
    def networks(cls, num_experts: int, d_ffn: int, k: int) -> tuple[int, int]:
        return 1, num_experts * d_ffn

    @classmethod
    def executed_experts(cls, num_experts: int, k: int, density: float, seq_len: int, **options: Any) -> float:
        return num_experts


def one_expert(x_TD: Tensor, mask_T: Tensor | None) -> Routing:
    """Every token that is not padding in one pair, with expert 0 and gate one."""
    T, device = x_TD.shape[0], x_TD.device
    gate_T1 = torch.ones(T, 1, device=device)
    if mask_T is None:
        token_N = torch.arange(T, device=device)
        count_E = torch.full((1,), T, device=device)
        assignment = Assignment(token_N, torch.zeros_like(token_N), gate_T1.squeeze(1), count_E, T)
    else:
        gate_T1 = gate_T1 * mask_T[:, None]
        assignment = Assignment.from_gates(gate_T1, mask_T[:, None])
    return Routing(assignment, gate_T1, None, count_tokens(x_TD, mask_T), torch.zeros((), device=device))
