"""Hash routing: the expert is a fixed function of the token's id (arXiv 2106.04426; the paper's "Hash": id mod E).

Legend: T tokens, E experts.
"""

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.routing.assignment import Assignment, Routing, count_tokens, unmasked
from remoe.routing.base import Router


class HashRouter(Router):
    """Experts (k id + j) mod E for j < k, with gate one each: for k = 1 it is id mod E.

    An expert that granularity splits into k parts is thus the same function of the token as before the split. No
    parameters, no regulariser.
    """

    needs_ids = True
    has_logits = False

    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, *, ids_T: Tensor | None = None, **_: object
    ) -> Routing:
        if ids_T is None:
            raise ConfigError('router "hash" needs token ids: layer(x, token_ids=...), and a model input_ids')
        part_K = torch.arange(self.k, device=ids_T.device)
        expert_TK = (self.k * ids_T[:, None] + part_K) % self.num_experts
        active_TE = torch.zeros(ids_T.shape[0], self.num_experts, dtype=torch.bool, device=ids_T.device)
        active_TE = unmasked(active_TE.scatter(1, expert_TK, True), mask_T)
        gate_TE = active_TE.float()
        nothing = torch.zeros((), device=x_TD.device)
        pairs = Assignment.from_gates(gate_TE, active_TE, ids_T.shape[0] * self.k)
        return Routing(pairs, gate_TE, None, count_tokens(x_TD, mask_T), nothing)
