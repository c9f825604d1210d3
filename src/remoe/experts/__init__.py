"""Expert execution: weights of all experts of a layer, and the backends that run the routed pairs.

Legend: T tokens, D model width, F expert width, E experts.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.experts.loop import loop_experts
from remoe.experts.naive import naive_experts
from remoe.routing.assignment import Assignment

BACKENDS = {"naive": naive_experts, "loop": loop_experts}

logger = logging.getLogger(__name__)


class Experts(nn.Module):
    """E SwiGLU feed-forward networks in the weight layout of transformers v5.

    Args:
        num_experts: E.
        d_model: D.
        d_expert: F, the width of one expert.
        backend: "auto", "loop" or "naive" (the specification: slow, for tests).

    Raises:
        ConfigError: for an unknown backend.
    """

    def __init__(self, num_experts: int, d_model: int, d_expert: int, backend: str = "auto") -> None:
        super().__init__()
        if backend != "auto" and backend not in BACKENDS:
            raise ConfigError(f"unknown experts backend {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_expert, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        self.backend = "loop" if backend == "auto" else backend
        logger.debug("experts backend: %s (asked for: %s)", self.backend, backend)

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Runs the routed pairs and sums them per token.

        Args:
            x_TD: (T, D).
            assignment: pairs over these T tokens and E experts.

        Returns:
            (T, D), zero for a token without an expert; in the autocast dtype under autocast, else in x's.
        """
        x_TD, gate_up, down = _autocast(x_TD, self.gate_up_proj, self.down_proj)
        return BACKENDS[self.backend](x_TD, gate_up, down, assignment)

    def run_first(self, x_TD: Tensor) -> Tensor:
        """(T, D): every token through expert 0 with gate one; the dense layer, without gathers."""
        gate_TF, up_TF = F.linear(x_TD, self.gate_up_proj[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TF) * up_TF, self.down_proj[0])

    def extra_repr(self) -> str:
        E, D, F_ = self.down_proj.shape
        return f"num_experts={E}, d_model={D}, d_expert={F_}, backend={self.backend}"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast a custom autograd function must be given tensors that are cast already."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
