"""ReLU routing with a learned scale per expert: DECO, arXiv 2605.10933.

Legend: T tokens, D model width, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from remoe.errors import check, check_choice
from remoe.routing.auxiliary_losses import gate_entropy
from remoe.routing.base import GateRule
from remoe.routing.relu import ReLURouter

PENALTIES = ("entropy", "l1")


class ReLUScaledRouter(ReLURouter):
    """gate = a_e * ReLU(x W)_e with a learned a, so that the penalty need not fight over the gates' size.

    DECO's router only, in our layer. DECO's layer also has a shared expert (`shared_expert_size` of `MoE`), experts
    without a gate projection, which normalise inside (NormSiLU), where its small first scale belongs, and a dense first
    layer. Its lambda moves by a factor of 1.002 a step (`alpha` of the sign rule) and never below its start.

    Args:
        d_model: D.
        num_experts: E.
        k: target experts per token, a mean.
        penalty: what lambda multiplies. "entropy": the mean entropy of a token's gates, DECO's. "l1": the penalty of
            `ReLURouter` on ReLU(x W), without the scale.
        scale_init: every a_e at the start; DECO's 0.1.
        options: those of `ReLURouter`; load_balance and load_balance_power with penalty "l1" only.

    Raises:
        ConfigError: as `ReLURouter`, and for an unknown penalty, scale_init <= 0, or an option that has no effect.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        *,
        penalty: str = "entropy",
        scale_init: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, k, **options)
        check_choice("penalty", penalty, PENALTIES)
        default = options.get("load_balance", True) and options.get("load_balance_power", 1) == 1
        check(penalty == "l1" or default, "load_balance and load_balance_power have no effect with penalty 'entropy'")
        check(scale_init > 0, f"scale_init must be above zero, but is {scale_init}")
        self.penalty_kind, self.scale_init = penalty, scale_init
        self.scale = nn.Parameter(torch.full((num_experts,), scale_init))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        super().reset_parameters(std)
        nn.init.constant_(self.scale, self.scale_init)

    def gate_rule(self) -> GateRule | None:
        if self.cap is not None or type(self) is not ReLUScaledRouter:
            return None
        return GateRule("relu", self.weight, self.bias, self.scale, self.k, self.gate_scale)

    @property
    def balances(self) -> bool:
        return self.load_balance and self.penalty_kind == "l1"

    def penalty(self, gate_TE: Tensor, count_E: Tensor | None, num_tokens: Tensor) -> Tensor:
        if self.penalty_kind == "entropy":
            return gate_entropy(self.scaled(gate_TE), num_tokens=num_tokens)
        return super().penalty(gate_TE, count_E, num_tokens)

    def scaled(self, gate_TE: Tensor) -> Tensor:
        return super().scaled(gate_TE) * self.scale.to(gate_TE.dtype)
