"""Expert choice: each expert takes the tokens that it likes best (arXiv 2202.09368, section 3.2).

Legend: T tokens, D model width, E experts.
"""

from torch import Tensor

from remoe.routing.assignment import Routing
from remoe.routing.cutoffs import CutoffRouter


class ExpertChoiceRouter(CutoffRouter):
    """Expert e takes the T k / E tokens with the largest softmax(x W)_e, which is their gate. No regulariser.

    The choice looks at the whole batch, so that training is not causal. At evaluation that would tell a token about
    later ones, and leave a single token without a choice to be part of: there a token is active above a cutoff, the
    moving average of the scores that training's choices lay above.

    Args:
        d_model: D.
        num_experts: E.
        k: mean experts per token.
        causal_evaluation: false chooses among the batch at evaluation too: not causal, and not comparable.
        decay: of the cutoffs' moving average, per step.
    """

    looks_ahead = True

    def __init__(
        self, d_model: int, num_experts: int, k: int, *, causal_evaluation: bool = True, decay: float = 0.99
    ) -> None:
        super().__init__(d_model, num_experts, k, decay)
        self.causal = causal_evaluation

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        by_choice = self.training or not self.causal
        return self.route(x_TD, mask_T, logits_TE, logits_TE.softmax(dim=1), by_choice)
