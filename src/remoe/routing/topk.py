"""TopK routing as the paper's dropless baseline has it (arXiv 2412.14711, section 4; Megatron-LM's dMoE).

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor

from remoe.routing.assignment import Assignment, Routing, count_tokens
from remoe.routing.base import Router
from remoe.routing.regularizers import switch_loss


class TopKRouter(Router):
    """Softmax over all experts, then the k largest; kept probabilities are not renormalised, no token is dropped.

    Args:
        d_model: D.
        num_experts: E.
        k: experts per token.

    Raises:
        ConfigError: when k is not in 1..E.
    """

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        prob_TE = logits_TE.softmax(dim=1)
        chosen = prob_TE.topk(self.k, dim=1).indices
        active_TE = torch.zeros_like(prob_TE, dtype=torch.bool).scatter(1, chosen, True)
        if mask_T is not None:
            active_TE = active_TE & mask_T[:, None]
            prob_TE = prob_TE.masked_fill(~mask_T[:, None], 0)
        num_tokens = count_tokens(x_TD, mask_T)
        assignment = Assignment.from_gates(prob_TE, active_TE)
        regularizer = switch_loss(prob_TE, assignment.count_E, k=self.k, num_tokens=num_tokens)
        return Routing(assignment, prob_TE * active_TE, logits_TE, num_tokens, regularizer)
