"""SparseMixer-v2 routing: sampled experts, and a gradient for the choice (GRIN, arXiv 2409.12136, section 2.2).

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor

from remoe.errors import check
from remoe.routing.assignment import Assignment, Routing, count_tokens, unmasked
from remoe.routing.auxiliary_losses import switch_loss
from remoe.routing.base import LinearRouter


class SparseMixerRouter(LinearRouter):
    """k experts, one draw after the other from a softmax over the experts that come near the largest logit.

    A draw masks experts with (max - z) / max(|z|, max) > 2 * jitter. In training it samples among the others (Gumbel);
    at evaluation it takes the largest. Its gate is pi * m: pi the masked softmax of the drawn expert, m = 1 if the
    sample is the largest or with probability 1/4, otherwise 1/3 (Heun's third-order estimate). The gradient
    is that of pi, as in the authors' code.

    Args:
        d_model: D.
        num_experts: E.
        k: experts per token.
        jitter: half the relative distance within which an expert may be drawn; the authors' 0.1.

    Raises:
        ConfigError: when k is not in 1..E, or jitter not in [0, 1).
    """

    def __init__(self, d_model: int, num_experts: int, k: int, *, jitter: float = 0.1) -> None:
        super().__init__(d_model, num_experts, k)
        check(0 <= jitter < 1, f"jitter must be at least 0 and below 1, but is {jitter}")
        self.jitter = jitter

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        gate_TE = torch.zeros_like(logits_TE)
        active_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        for _draw in range(self.k):
            expert_T1, gate_T1 = self._draw(logits_TE, active_TE)
            gate_TE = gate_TE.scatter(1, expert_T1, gate_T1)
            active_TE = active_TE.scatter(1, expert_T1, True)
        active_TE = unmasked(active_TE, mask_T)
        prob_TE = logits_TE.softmax(dim=1)
        if mask_T is not None:
            prob_TE = prob_TE.masked_fill(~mask_T[:, None], 0)
        num_tokens = count_tokens(x_TD, mask_T)
        regularizer = switch_loss(prob_TE, self.load(active_TE, num_tokens), k=self.k, num_tokens=num_tokens)
        gate_TE = gate_TE * active_TE
        pairs = Assignment.from_gates(gate_TE, active_TE, x_TD.shape[0] * self.k)
        return Routing(pairs, gate_TE, logits_TE, num_tokens, regularizer)

    def _draw(self, logits_TE: Tensor, drawn_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 1) int64 and float32: one more expert of each token, and its gate."""
        left_TE = logits_TE.masked_fill(drawn_TE, -torch.inf)
        with torch.no_grad():
            best_T1, best_expert_T1 = left_TE.max(dim=1, keepdim=True)
            far_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1) > 2 * self.jitter
        near_TE = left_TE.masked_fill(far_TE, -torch.inf)
        pi_TE = near_TE.softmax(dim=1)
        if not self.training:
            return best_expert_T1, pi_TE.gather(1, best_expert_T1)
        gumbel_TE = -torch.empty_like(near_TE).exponential_().log()
        expert_T1 = (near_TE.detach() + gumbel_TE).argmax(dim=1, keepdim=True)
        pi_T1 = pi_TE.gather(1, expert_T1)
        whole_T1 = (expert_T1 == best_expert_T1) | (torch.rand_like(pi_T1) > 0.75)
        m_T1 = torch.where(whole_T1, 1.0, 1 / 3)
        return expert_T1, pi_T1 + (pi_T1 * (m_T1 - 1)).detach()
