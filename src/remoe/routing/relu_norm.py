"""Normalised ReLU routing: BlockFFN, arXiv 2507.08771.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.errors import check, check_choice
from remoe.routing.assignment import Assignment, Routing, count_tokens
from remoe.routing.auxiliary_losses import chunk_sparsity_loss, locality_loss
from remoe.routing.base import LinearRouter, scaled_load
from remoe.routing.regularizers import load_balanced_l1_loss

PENALTIES = ("l1", "chunk")


class ReLUNormRouter(LinearRouter):
    """gate = RMSNorm(ReLU(x W)) over the E experts, with a learned weight per expert: L1 cannot shrink the gates.

    A token with one open expert has a gate that does not depend on the logit, and gets no gradient of the task through
    it: of little weight with a fifth of many experts open, as in the paper, but of much with k = 1.

    Args:
        d_model: D.
        num_experts: E.
        k: target experts per token, a mean. The paper has no target; its sparsity emerges.
        penalty: what lambda multiplies. "l1": load-balanced L1 of the normalised gates without their weight, ours: it
            does not depend on the logits' scale, and is smallest with one expert per token. "chunk": the paper's, the
            share of the experts that `chunk` neighbouring tokens need.
        chunk: tokens of a chunk; the paper's 64.
        locality: weight of the paper's locality loss, which makes neighbouring tokens use the same experts; 0 for
            none.
        sharpness: a in sigmoid(a * logit) of the locality loss; 100 in the authors' code.
        eps: added to the mean square; 1e-6 in the authors' code. Gates far below its root are not normalised.

    Raises:
        ConfigError: when k is not in 1..E, for an unknown penalty, chunk < 1, eps <= 0 or locality < 0.
    """

    steered = True
    needs_documents = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        *,
        penalty: str = "l1",
        chunk: int = 64,
        locality: float = 0.0,
        sharpness: float = 100.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, num_experts, k)
        check_choice("penalty", penalty, PENALTIES)
        fine = chunk >= 1 and eps > 0 and locality >= 0
        check(fine, f"need chunk >= 1, eps > 0 and locality >= 0, but they are {chunk}, {eps} and {locality}")
        self.penalty, self.chunk, self.locality, self.sharpness, self.eps = penalty, chunk, locality, sharpness, eps
        self.scale = nn.Parameter(torch.ones(num_experts))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        super().reset_parameters(std)
        nn.init.ones_(self.scale)

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        *,
        seq_len: int | None = None,
        document_T: Tensor | None = None,
        **_: object,
    ) -> Routing:
        logits_TE = self.logits(x_TD)
        open_TE = F.relu(logits_TE)
        if mask_T is not None:
            open_TE = open_TE.masked_fill(~mask_T[:, None], 0)
        active_TE = open_TE != 0  # positive or NaN, which must stay visible in the output
        normed_TE = F.rms_norm(open_TE, (self.num_experts,), eps=self.eps)
        gate_TE = normed_TE * self.scale.to(normed_TE.dtype)
        num_tokens = count_tokens(x_TD, mask_T)
        seq_len = x_TD.shape[0] if seq_len is None else seq_len
        counted_E1 = self.counted(active_TE, num_tokens) if self.penalty == "l1" else None
        if counted_E1 is None:
            regularizer = chunk_sparsity_loss(
                open_TE, mask_T, seq_len=seq_len, chunk=self.chunk, num_tokens=num_tokens, document_T=document_T
            )
        else:
            count_E = scaled_load(counted_E1, num_tokens)
            regularizer = load_balanced_l1_loss(normed_TE, count_E, k=self.k, num_tokens=num_tokens)
        closed_loss, extra_loss = self.opening_losses(logits_TE, counted_E1, num_tokens, mask_T)
        if self.locality and self.training:
            locality = self.locality * locality_loss(
                logits_TE, mask_T, seq_len=seq_len, sharpness=self.sharpness, document_T=document_T
            )
            extra_loss = locality if extra_loss is None else extra_loss + locality
        assignment = Assignment.from_gates(gate_TE, active_TE)
        return Routing(assignment, gate_TE, logits_TE, num_tokens, regularizer, extra_loss, closed_loss=closed_loss)
