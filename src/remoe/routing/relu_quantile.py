"""ReLU routing with a learned zero instead of a penalty: ours, between ReMoE and Expert Threshold routing.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.routing.assignment import Routing
from remoe.routing.base import check_gate_scale
from remoe.routing.cutoffs import CutoffRouter, choose_tokens


class ReLUQuantileRouter(CutoffRouter):
    """gate = ReLU(x W - c): c_e is a moving average of the (1 - k/E) quantile of expert e's logits.

    As continuous as ReLU routing (a pair enters and leaves with gate zero), but sparse and balanced from the first
    step on: no dense stage, no lambda, and no penalty that shrinks the gates. c has no gradient. Causal once the first
    step has given it a value.

    Args:
        d_model: D.
        num_experts: E.
        k: mean experts per token.
        gate_scale: constant factor on the gates.
        decay: of the moving average, per step.
    """

    def __init__(self, d_model: int, num_experts: int, k: int, *, gate_scale: float = 1.0, decay: float = 0.95) -> None:
        super().__init__(d_model, num_experts, k, decay)
        self.gate_scale = check_gate_scale(gate_scale)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        _, cutoff_E = choose_tokens(logits_TE, mask_T, self.k)
        zero_E = torch.where(self.updates == 0, cutoff_E, self.cutoff_E) if self.training else self.cutoff_E
        gate_TE = F.relu(logits_TE - zero_E) * self.gate_scale
        if mask_T is not None:
            gate_TE = gate_TE.masked_fill(~mask_T[:, None], 0)
        return self.routing(x_TD, mask_T, logits_TE, gate_TE, gate_TE > 0, cutoff_E)
