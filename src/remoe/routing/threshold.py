"""Expert Threshold routing: a token is active above its expert's moving threshold (arXiv 2603.11535).

Legend: T tokens, D model width, E experts.
"""

from torch import Tensor

from remoe.errors import check
from remoe.routing.assignment import Routing
from remoe.routing.base import GateRule
from remoe.routing.cutoffs import CutoffRouter


class ThresholdRouter(CutoffRouter):
    """Expert e is active where score_e > c_e; c_e is a moving average of the (1 - k/E) quantile of the step's scores.

    Causal at evaluation, and in training after the warm-up; balanced without a loss, 0 to E experts per token. The
    score is sigmoid(x W), which is also the gate.

    Args:
        d_model: D.
        num_experts: E.
        k: mean experts per token.
        warmup_steps: steps of expert choice at the start, while the thresholds are learned; at least one. The paper
            takes 4000 of its long runs.
        decay: of the moving average, per step.

    Raises:
        ConfigError: when k is not in 1..E or there is no warm-up step.
    """

    looks_ahead = True

    def __init__(self, d_model: int, num_experts: int, k: int, *, warmup_steps: int = 100, decay: float = 0.99) -> None:
        super().__init__(d_model, num_experts, k, decay)
        check(warmup_steps >= 1, f"warmup_steps must be at least 1, but is {warmup_steps}")
        self.warmup_steps = warmup_steps

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        by_choice = self.updates < self.warmup_steps if self.training else False
        return self.route(x_TD, mask_T, logits_TE, logits_TE.sigmoid(), by_choice)

    def gate_rule(self) -> GateRule | None:
        if type(self) is not ThresholdRouter:
            return None
        return GateRule("cutoff", self.weight, None, self.cutoff_E, self.k)

    def gates(self, x_TD: Tensor) -> Tensor:
        score_TE = self.logits(x_TD).sigmoid()
        return score_TE * self.above(score_TE)
