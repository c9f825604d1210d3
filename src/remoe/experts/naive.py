"""The specification of expert execution: what every backend must equal, output and gradients.

y_t = sum over the pairs of t of gate * down_e( silu(gate_e(x_t)) * up_e(x_t) )      (arXiv 2412.14711, section 2)

Legend: T tokens, D model width, F expert width, E experts, R routed pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.adapters import Adapters
from remoe.experts.contract import Backend
from remoe.routing.assignment import Assignment


def naive_experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, assignment: Assignment, adapters: Adapters | None = None
) -> Tensor:
    """One expert after the other, in plain differentiable operations.

    Args:
        x_TD: (T, D).
        gate_up_E2FD: (E, 2F, D), the gate projection's F rows before the up projection's.
        down_EDF: (E, D, F).
        assignment: the routed pairs.
        adapters: what is added to the weights.

    Returns:
        (T, D); zero rows for tokens without an expert.
    """
    if adapters is not None:
        gate_up_E2FD = gate_up_E2FD + adapters.gate_up.materialised()
        down_EDF = down_EDF + adapters.down.materialised()
    y_TD = torch.zeros_like(x_TD)
    # Experts without tokens take part with empty slices, so that their gradients are zero and not missing.
    for e in range(assignment.num_experts):
        pairs = assignment.expert_N == e
        token_r = assignment.token_N[pairs]
        gate_rF, up_rF = F.linear(x_TD[token_r], gate_up_E2FD[e]).chunk(2, dim=-1)
        out_rD = F.linear(F.silu(gate_rF) * up_rF, down_EDF[e])
        y_TD = y_TD.index_add(0, token_r, (assignment.gate_N[pairs, None] * out_rD).to(y_TD.dtype))
    return y_TD


BACKEND = Backend(obstacle=lambda *_: None, function=naive_experts)
