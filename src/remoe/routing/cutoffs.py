"""Routing by expert: each takes the tokens with its largest scores, or all above a cutoff learned from them.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor, nn

from remoe.errors import check
from remoe.routing.assignment import Assignment, Routing, count_tokens, unmasked
from remoe.routing.base import LinearRouter


def choose_tokens(score_TE: Tensor, mask_T: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Each expert's round(T k / E) tokens with the largest scores, and the score that they lie above.

    Args:
        score_TE: (T, E).
        mask_T: (T,) bool, false for padding, which is not chosen and not part of T.
        k: target experts per token, a mean.

    Returns:
        active_TE: (T, E) bool.
        cutoff_E: (E,), the largest score that was not chosen; the smallest one where all were.
    """
    T, E = score_TE.shape
    score_TE = score_TE.detach()
    if T == 0:
        return torch.zeros_like(score_TE, dtype=torch.bool), score_TE.new_zeros(E)
    if mask_T is not None:
        score_TE = score_TE.masked_fill(~mask_T[:, None], torch.finfo(score_TE.dtype).min)
    sorted_TE, order_TE = score_TE.sort(dim=0, descending=True, stable=True)
    tokens = count_tokens(score_TE, mask_T)
    chosen = (tokens * k + E // 2) // E
    first_T1 = torch.arange(T, device=score_TE.device)[:, None] < chosen
    active_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(0, order_TE, first_T1.expand(T, E))
    cutoff_E = sorted_TE[torch.minimum(chosen, tokens - 1).clamp(min=0).reshape(1)].squeeze(0)
    return unmasked(active_TE, mask_T), cutoff_E


class CutoffRouter(LinearRouter):
    """A router with one cutoff per expert, a moving average of the scores that its chosen tokens lie above.

    The average starts with the first step's cutoffs; before that the cutoffs are zero.

    Args:
        d_model: D.
        num_experts: E.
        k: target experts per token, a mean.
        decay: of the moving average, per step, from 0 to below 1.

    Raises:
        ConfigError: when k is not in 1..E, or the decay is out of range.
    """

    cutoff_E: Tensor
    updates: Tensor

    def __init__(self, d_model: int, num_experts: int, k: int, decay: float) -> None:
        super().__init__(d_model, num_experts, k)
        check(0 <= decay < 1, f"decay must be at least 0 and below 1, but is {decay}")
        self.decay = decay
        self.register_buffer("cutoff_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def route(
        self, x_TD: Tensor, mask_T: Tensor | None, logits_TE: Tensor, score_TE: Tensor, by_choice: bool | Tensor
    ) -> Routing:
        """The routing with scores as gates, without a regulariser; the cutoffs of these tokens are its statistic.

        Args:
            x_TD, mask_T: as in `forward`.
            logits_TE: (T, E).
            score_TE: (T, E), what is compared and, for active pairs, the gate.
            by_choice: the experts choose among these tokens; otherwise tokens above the cutoffs are active.
        """
        num_tokens, known_E = count_tokens(x_TD, mask_T), self.cutoff_E
        above_TE = unmasked(self.above(score_TE), mask_T)
        active_TE = above_TE
        if by_choice is not False:
            chosen_TE, cutoff_E = choose_tokens(score_TE, mask_T, self.k)
            known_E = torch.where(num_tokens > 0, cutoff_E.float(), self.cutoff_E)
            active_TE = chosen_TE if by_choice is True else torch.where(by_choice, chosen_TE, above_TE)
        gate_TE = score_TE * active_TE
        nothing = torch.zeros((), device=x_TD.device)
        assignment = Assignment.from_gates(gate_TE, active_TE)
        return Routing(assignment, gate_TE, logits_TE, num_tokens, nothing, statistic_E=known_E)

    def above(self, score_TE: Tensor) -> Tensor:
        """(T, E) bool: which scores lie above their expert's cutoff."""
        # With k = E no score is the largest that was not chosen: every token is active.
        # NaN counts as above, so that it stays visible in the output.
        return ~(score_TE <= self.cutoff_E) | (self.k == self.num_experts)

    @torch.no_grad()
    def reset_state(self) -> None:
        nn.init.zeros_(self.cutoff_E)
        nn.init.zeros_(self.updates)

    @torch.no_grad()
    def update_state(self, load_E: Tensor, statistic_E: Tensor) -> None:
        moved_E = self.decay * self.cutoff_E + (1 - self.decay) * statistic_E
        self.cutoff_E.copy_(torch.where(self.updates == 0, statistic_E, moved_E))
        self.updates += 1
