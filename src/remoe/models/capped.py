"""A layer in which a token has at most c experts, with the experts called as transformers' own mixtures call theirs.

Engines that replace a mixture's experts by kernels of their own expect `experts(hidden_states, top_k_index,
top_k_weights)` with the same number of slots for every token. ReLU routing fills some of them; the others have the
weight zero.

Legend: T tokens, D model width, F expert width, E experts, c slots of a token.
"""

import torch
from torch import Tensor, nn

from remoe.experts import Experts
from remoe.layer import MoE
from remoe.routing import Routing
from remoe.routing.assignment import Assignment


class CappedExperts(Experts):
    """Experts that take their pairs as slots of the tokens."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs the pairs in the slots.

        Args:
            hidden_states: (T, D).
            top_k_index: (T, c) int64, the experts of each token; any expert for a slot that is not used.
            top_k_weights: (T, c), their gates; zero for a slot that is not used.

        Returns:
            (T, D), as `Experts`.
        """
        T, E = hidden_states.shape[0], self.down_proj.shape[0]
        gate_TE = top_k_weights.new_zeros(T, E).scatter_add(1, top_k_index, top_k_weights)
        pairs = Assignment.from_gates(gate_TE, gate_TE != 0, top_k_index.numel())
        return super().forward(hidden_states, pairs, pairs.gate_N)


class CappedMoE(MoE):
    """`MoE` in which a token has at most `cap` experts, those with the largest gates, in training too."""

    def __init__(self, cap: int, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.cap = min(cap, self.router.num_experts)
        plain, (E, D, F_) = self.experts, self.experts.down_proj.shape
        self.experts = CappedExperts(E, D, F_, plain.backend, plain.k)
        self.experts.load_state_dict(plain.state_dict())

    def _limited(self, routing: Routing, threshold: float | Tensor, cap: int | Tensor | None) -> Routing:
        if self.training:
            return routing.pruned(0.0, self.cap)
        if isinstance(cap, Tensor):
            return routing.pruned(threshold, cap.clamp(max=self.cap))
        return routing.pruned(threshold, min(self.cap, cap or self.cap))

    def _slots(self, routing: Routing) -> tuple[Tensor, Tensor]:
        size_TE = routing.gate_TE.detach().abs()
        index_Tc = size_TE.topk(self.cap, dim=1).indices
        weight_Tc = routing.gate_TE.gather(1, index_Tc)
        # The token's first expert where there is no other: engines read past their weights for an index E.
        return torch.where(weight_Tc != 0, index_Tc, index_Tc[:, :1]), weight_Tc


def build_mixture(cap: int | None, *args: object, **options: object) -> nn.Module:
    """`MoE` with these arguments, with a cap on a token's experts unless that is None."""
    return MoE(*args, **options) if cap is None else CappedMoE(cap, *args, **options)
