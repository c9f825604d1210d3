"""TopK routing as the paper's dropless baseline has it (arXiv 2412.14711, section 4; Megatron-LM's dMoE).

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor, nn

from remoe.errors import check
from remoe.routing.assignment import Assignment, Routing, count_tokens, largest, unmasked
from remoe.routing.auxiliary_losses import switch_loss
from remoe.routing.base import GateRule, LinearRouter


class TopKRouter(LinearRouter):
    """Softmax over all experts, then the k largest; kept probabilities are not renormalised, no token is dropped.

    Args:
        d_model: D.
        num_experts: E.
        k: experts per token.
        renormalize: divide the kept probabilities by their sum: the softmax of the kept logits alone ("softmax after
            top-k"). With k = 1 the gate is then always one and the router learns from the load-balance loss alone.
        warmup_k: experts per token in the first `warmup_steps` updates: the near-dense warm-up of the paper (6 for
            100 steps at E = 8).
        warmup_steps: see `warmup_k`; counted by `update`.
        gate_scale: constant factor on the gates, as DeepSeek-V3's routed scaling factor (2412.19437). Softmax starts
            with gates of 1/E, so that E/k gives the experts of a fresh model the output of a dense layer.

    Raises:
        ConfigError: when k or warmup_k is not in 1..E, or the scale is not positive.
    """

    updates: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        *,
        renormalize: bool = False,
        warmup_k: int | None = None,
        warmup_steps: int = 0,
        gate_scale: float = 1.0,
    ) -> None:
        super().__init__(d_model, num_experts, k)
        between = warmup_k is None or k <= warmup_k <= num_experts
        check(between, f"warmup_k must be between k = {k} and E = {num_experts}, but is {warmup_k}")
        both = warmup_steps >= 0 and (warmup_steps > 0) == (warmup_k is not None)
        check(both, "warmup_k and warmup_steps go together")
        check(gate_scale > 0, f"gate_scale must be above zero, but is {gate_scale}")
        self.renormalize, self.gate_scale = renormalize, gate_scale
        self.warmup_k, self.warmup_steps = warmup_k, warmup_steps
        if warmup_k is not None:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        prob_TE = logits_TE.softmax(dim=1)
        active_TE = largest(prob_TE, self.k)
        k: int | Tensor = self.k
        if self.warmup_k is not None:
            warming = self.updates < self.warmup_steps  # stays on the device: no host sync
            active_TE = active_TE | (largest(prob_TE, self.warmup_k) & warming)
            k = torch.where(warming, self.warmup_k, self.k)
        active_TE = unmasked(active_TE, mask_T)
        if mask_T is not None:
            prob_TE = prob_TE.masked_fill(~mask_T[:, None], 0)
        num_tokens = count_tokens(x_TD, mask_T)
        regularizer = switch_loss(prob_TE, self.load(active_TE, num_tokens), k=k, num_tokens=num_tokens)
        gate_TE = self._gates(prob_TE, active_TE)
        pairs = Assignment.from_gates(gate_TE, active_TE, x_TD.shape[0] * (self.warmup_k or self.k))
        return Routing(pairs, gate_TE, logits_TE, num_tokens, regularizer)

    def gates(self, x_TD: Tensor) -> Tensor | None:
        if self.warmup_k is not None:
            return None
        prob_TE = self.logits(x_TD).softmax(dim=1)
        return self._gates(prob_TE, largest(prob_TE, self.k))

    def gate_rule(self) -> GateRule | None:
        if self.warmup_k is not None or type(self) is not TopKRouter:
            return None
        return GateRule("softmax", self.weight, None, None, self.k, self.gate_scale, self.renormalize)

    def _gates(self, prob_TE: Tensor, active_TE: Tensor) -> Tensor:
        gate_TE = prob_TE * active_TE
        if self.renormalize:
            gate_TE = gate_TE / gate_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gate_TE.dtype).tiny)
        return gate_TE if self.gate_scale == 1 else gate_TE * self.gate_scale

    @torch.no_grad()
    def reset_state(self) -> None:
        if self.warmup_k is not None:
            nn.init.zeros_(self.updates)

    @torch.no_grad()
    def update_state(self, load_E: Tensor, statistic_E: Tensor) -> None:
        if self.warmup_k is not None:
            self.updates += 1
