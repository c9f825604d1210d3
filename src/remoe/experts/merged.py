"""Experts whose weights are mixed before they run: one network per segment of a sequence.

Legend: T tokens, B sequences, M segments of a sequence, C = B M segments, S tokens of a segment, D model width,
F expert width, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.module import Experts, autocast_tensors


class MergedExperts(Experts):
    """The networks of `Experts`, merged in parameter space (Lory, arXiv 2405.03133, section 2).

    Each segment of a sequence goes through one network of one expert's width, whose weights are a mixture of all
    experts' weights. The parameters are those of `Experts`; the products are dense, and `backend` and `k` have no
    effect.
    """

    def forward(self, x_TD: Tensor, merge_BME: Tensor, seq_len: int, segment: int) -> Tensor:  # type: ignore[override]
        """Runs every token through the network of its segment.

        Args:
            x_TD: (T, D), the tokens of B sequences one after the other, T = B seq_len.
            merge_BME: (B, M, E), each segment's weights in the mixture.
            seq_len: tokens of a sequence.
            segment: S, tokens of a segment; a sequence's last one may be shorter: M = ceil(seq_len / S).

        Returns:
            (T, D), in the autocast dtype under autocast, otherwise in x's.
        """
        x_TD, gate_up_E2FD, down_EDF, merge_BME = autocast_tensors(x_TD, self.gate_up_proj, self.down_proj, merge_BME)
        (B, M, E), D = merge_BME.shape, x_TD.shape[1]
        merge_CE = merge_BME.reshape(B * M, E).to(gate_up_E2FD.dtype)
        gate_up_C2FD = (merge_CE @ gate_up_E2FD.flatten(1)).view(B * M, *gate_up_E2FD.shape[1:])
        down_CDF = (merge_CE @ down_EDF.flatten(1)).view(B * M, *down_EDF.shape[1:])
        padding = M * segment - seq_len
        x_CSD = F.pad(x_TD.view(B, seq_len, D), (0, 0, 0, padding)).view(B * M, segment, D)
        gate_CSF, up_CSF = torch.bmm(x_CSD, gate_up_C2FD.mT).chunk(2, dim=-1)
        y_CSD = torch.bmm(F.silu(gate_CSF) * up_CSF, down_CDF.mT)
        return y_CSD.view(B, M * segment, D)[:, :seq_len].reshape(x_TD.shape)
