"""No routing: every token goes to the one expert with gate one. The dense baselines behind the same interface.

Legend: T tokens.
"""

import torch
from torch import Tensor

from remoe.routing.assignment import Assignment, Routing, count_tokens
from remoe.routing.base import Router


class DenseRouter(Router):
    """Sends every token to expert 0; has no parameters and no regulariser. Takes no sizes: there is one expert."""

    def __init__(self) -> None:
        super().__init__(d_model=0, num_experts=1, k=1)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        return one_expert(x_TD, mask_T)

    def extra_repr(self) -> str:
        return ""


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
