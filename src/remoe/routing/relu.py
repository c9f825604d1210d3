"""ReLU routing: arXiv 2412.14711, Eq. 5, with the L1 penalty of Eq. 9 or Eq. 10 and 11.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.routing.assignment import Assignment, Routing, count_tokens
from remoe.routing.base import Router
from remoe.routing.regularizers import l1_loss, load_balanced_l1_loss


class ReLURouter(Router):
    """gate = ReLU(x W): each expert switches on and off by itself, and a token may have 0 to E of them.

    Args:
        d_model: D.
        num_experts: E.
        k: wanted mean of active experts per token; the sparsity controller steers to 1 - k/E.
        load_balance: weight the penalty by each expert's load (Eq. 10 and 11) instead of plain L1 (Eq. 9).
        max_experts_per_token: execute only that many of a token's active experts, those with the largest gates. The
            penalty still sees the gates that the cap cut off: they get no gradient from the task, so the penalty
            alone can close them.

    Raises:
        ConfigError: when k is not in 1..E or the cap is below k.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        *,
        load_balance: bool = True,
        max_experts_per_token: int | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, k)
        if max_experts_per_token is not None and max_experts_per_token < k:
            raise ConfigError(f"max_experts_per_token must be at least k = {k}, but is {max_experts_per_token}")
        self.load_balance = load_balance
        self.max_experts_per_token = max_experts_per_token

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        gate_TE = F.relu(logits_TE)
        if mask_T is not None:
            gate_TE = gate_TE.masked_fill(~mask_T[:, None], 0)
        active_TE = gate_TE > 0
        num_tokens = count_tokens(x_TD, mask_T)
        if self.load_balance:
            regularizer = load_balanced_l1_loss(gate_TE, active_TE.sum(dim=0), k=self.k, num_tokens=num_tokens)
        else:
            regularizer = l1_loss(gate_TE, num_tokens=num_tokens)

        cap = self.max_experts_per_token
        if cap is not None and cap < self.num_experts:
            largest = gate_TE.topk(cap, dim=1).indices
            active_TE = active_TE & torch.zeros_like(active_TE).scatter(1, largest, True)
            gate_TE = gate_TE * active_TE
        return Routing(Assignment.from_gates(gate_TE, active_TE), gate_TE, logits_TE, num_tokens, regularizer)
