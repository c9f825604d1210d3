"""Lory: experts merged in parameter space, one mixture per segment of a sequence (arXiv 2405.03133).

Legend: T tokens, B sequences, S sequence length, M segments of a sequence, D model width, E experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.errors import check, check_choice
from remoe.routing.assignment import Routing, tree
from remoe.routing.base import LinearRouter
from remoe.routing.dense import one_expert

SEGMENT = 256  # tokens; the paper's
FIRST_SEGMENTS = ("own", "uniform")


@tree
@dataclass(frozen=True, kw_only=True)
class MergedRouting(Routing):
    """A routing whose tokens run through networks merged from all experts, one for each segment of a sequence.

    Attributes:
        merge_BME: (B, M, E) float32, weights of the experts in each segment's network.
        segment: tokens of a segment; the last one of a sequence may be shorter.
        seq_len: S, tokens of a sequence.
        order_T: (T,) int64, the order of the rows in which the segments follow each other; None for the given one.
    """

    merge_BME: Tensor
    segment: int
    seq_len: int
    order_T: Tensor | None = None


class LoryRouter(LinearRouter):
    """Weights of all experts from the mean hidden state of the previous segment: softmax(mean W).

    The gates of a token are the weights with which its segment's expert is merged from the E experts; every token is
    executed by that one merged expert. No sparsity, no regulariser.

    Args:
        d_model: D.
        num_experts: E.
        k: must be 1: the merged expert has the size of one.
        segment: tokens of a segment; the paper's 256.
        first_segment: how the first segment is routed. "uniform": equal weights. "own": by its own mean, without
            gradient, as in the paper. Its first tokens then see its later ones: routing is not causal and losses do not
            compare. At inference the paper routes a whole prompt by its own mean; we merge segment by segment.

    Raises:
        ConfigError: when k is not 1, segment < 1, or for an unknown first_segment.
    """

    routes_pairs = False
    merges = True
    supports_cache = False  # its state is a mean over the segment before

    def __init__(
        self, d_model: int, num_experts: int, k: int, *, segment: int = SEGMENT, first_segment: str = "uniform"
    ) -> None:
        super().__init__(d_model, num_experts, k)
        check(k == 1, f"lory merges its experts into one: k (times granularity) must be 1, but is {k}")
        check(segment >= 1, f"segment must be at least 1, but is {segment}")
        check_choice("first_segment", first_segment, FIRST_SEGMENTS)
        self.segment, self.first_segment = segment, first_segment
        self.causal = first_segment == "uniform"
        self.looks_ahead = not self.causal

    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, *, seq_len: int | None = None, **_: object
    ) -> Routing:
        T = x_TD.shape[0]
        S = T if seq_len is None else seq_len
        order_T = None if mask_T is None else padding_last(mask_T, S)
        if order_T is None or mask_T is None:
            weights_BME = self._segment_weights(x_TD, None, S)
        else:
            weights_BME = self._segment_weights(x_TD[order_T], mask_T[order_T], S)
        gate_TE = weights_BME.repeat_interleave(self.segment, dim=1)[:, :S].reshape(T, self.num_experts)
        if order_T is not None and mask_T is not None:
            gate_TE = torch.zeros_like(gate_TE).index_copy(0, order_T, gate_TE).masked_fill(~mask_T[:, None], 0)
        one = one_expert(x_TD, mask_T)
        return MergedRouting(
            assignment=one.assignment,
            gate_TE=gate_TE,
            logits_TE=None,
            num_tokens=one.num_tokens,
            regularizer=one.regularizer,
            merge_BME=weights_BME,
            segment=self.segment,
            seq_len=S,
            order_T=order_T,
        )

    @classmethod
    def executed_experts(cls, num_experts: int, k: int, density: float, seq_len: int, **options: Any) -> float:
        segment = options.get("segment", SEGMENT)
        return 1 + num_experts * math.ceil(seq_len / segment) / seq_len  # the merged network, and the merging

    def _segment_weights(self, x_TD: Tensor, mask_T: Tensor | None, S: int) -> Tensor:
        """(B, M, E) float32: how each segment's expert is merged."""
        D = x_TD.shape[1]
        M = -(-S // self.segment)
        padding = M * self.segment - S
        kept_T1 = torch.ones_like(x_TD[:, :1]) if mask_T is None else mask_T[:, None].to(x_TD.dtype)
        x_BMSD = F.pad((x_TD * kept_T1).view(-1, S, D), (0, 0, 0, padding)).view(-1, M, self.segment, D)
        kept_BMS1 = F.pad(kept_T1.view(-1, S, 1), (0, 0, 0, padding)).view(-1, M, self.segment, 1)
        mean_BMD = x_BMSD.float().sum(dim=2) / kept_BMS1.float().sum(dim=2).clamp(min=1)
        previous_BMD = torch.cat([mean_BMD[:, :1].detach(), mean_BMD[:, :-1]], dim=1)
        weights_BME = self.logits(previous_BMD).softmax(dim=-1)
        if self.first_segment == "uniform":
            first_B1E = torch.full_like(weights_BME[:, :1], 1 / self.num_experts)
            weights_BME = torch.cat([first_B1E, weights_BME[:, 1:]], dim=1)
        return weights_BME


def padding_last(mask_T: Tensor, seq_len: int) -> Tensor:
    """(T,) int64: the rows with each sequence's padding moved behind its tokens, so that segments count tokens only."""
    mask_BS = mask_T.view(-1, seq_len)
    order_BS = (~mask_BS).to(torch.uint8).argsort(dim=1, stable=True)
    first_B1 = torch.arange(len(mask_BS), device=mask_T.device)[:, None] * seq_len
    return (order_BS + first_B1).flatten()
