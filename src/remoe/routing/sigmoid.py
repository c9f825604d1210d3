"""Sigmoid routing steered by a bias, without auxiliary loss: DeepSeek-V3, arXiv 2412.19437, Eq. 12 to 16.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor, nn

from remoe.errors import check
from remoe.routing.assignment import Assignment, Routing, count_tokens, largest, unmasked
from remoe.routing.base import GateRule, LinearRouter


class SigmoidRouter(LinearRouter):
    """The k largest of sigmoid(x W) + b; the gate is sigmoid(x W) over the sum of the chosen ones, without b.

    Once per update b_e += bias_step * sign(mean load - load_e): busy experts are chosen less.

    Args:
        d_model: D.
        num_experts: E.
        k: experts per token.
        renormalize: divide by the sum of the chosen scores. By default for k > 1 only: for k = 1 the gate would
            always be one and the router would never learn. With granularity G, k here is k G: say which, where
            several G are compared.
        bias_step: the paper's 0.001.
        gate_scale: constant factor on the gates, the paper's routed scaling factor.

    Raises:
        ConfigError: when k is not in 1..E, bias_step < 0 or gate_scale <= 0.
    """

    bias_E: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        *,
        renormalize: bool | None = None,
        bias_step: float = 1e-3,
        gate_scale: float = 1.0,
    ) -> None:
        super().__init__(d_model, num_experts, k)
        self.renormalize = k > 1 if renormalize is None else renormalize
        check(bias_step >= 0, f"bias_step must not be negative, but is {bias_step}")
        check(gate_scale > 0, f"gate_scale must be above zero, but is {gate_scale}")
        self.bias_step, self.gate_scale = bias_step, gate_scale
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE.sigmoid()
        active_TE = unmasked(largest(score_TE + self.bias_E, self.k), mask_T)
        gate_TE = self._gates(score_TE, active_TE)
        num_tokens = count_tokens(x_TD, mask_T)
        nothing = torch.zeros((), device=x_TD.device)
        pairs = Assignment.from_gates(gate_TE, active_TE, x_TD.shape[0] * self.k)
        return Routing(pairs, gate_TE, logits_TE, num_tokens, nothing)

    def gates(self, x_TD: Tensor) -> Tensor:
        score_TE = self.logits(x_TD).sigmoid()
        return self._gates(score_TE, largest(score_TE + self.bias_E, self.k))

    def gate_rule(self) -> GateRule | None:
        if type(self) is not SigmoidRouter:
            return None
        return GateRule("sigmoid", self.weight, None, self.bias_E, self.k, self.gate_scale, self.renormalize)

    def _gates(self, score_TE: Tensor, active_TE: Tensor) -> Tensor:
        gate_TE = score_TE * active_TE * self.gate_scale
        if not self.renormalize:
            return gate_TE
        total_T1 = (score_TE * active_TE).sum(dim=1, keepdim=True)
        return gate_TE / total_T1.clamp(min=torch.finfo(gate_TE.dtype).tiny)

    @torch.no_grad()
    def reset_state(self) -> None:
        nn.init.zeros_(self.bias_E)

    @torch.no_grad()
    def update_state(self, load_E: Tensor, statistic_E: Tensor) -> None:
        self.bias_E += self.bias_step * torch.sign(load_E.mean() - load_E)
