"""Experts merged in parameter space, one network for each segment of a sequence (Lory, arXiv 2405.03133).

Legend: T tokens, B sequences, S sequence length, M segments of a sequence, D model width, F expert width, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.module import Experts, autocast_tensors
from remoe.routing.lory import MergedRouting


class MergedExperts(Experts):
    """E networks of which each segment runs through one: theta = sum_e w_e theta_e, w from its `MergedRouting`."""

    def forward(self, x_TD: Tensor, routing: MergedRouting) -> Tensor:  # type: ignore[override]
        """(T, D): every token through the network of its segment, in the autocast dtype under autocast."""
        order_T = routing.order_T
        if order_T is None:
            return self._run(x_TD, routing)
        y_TD = self._run(x_TD[order_T], routing)
        return torch.zeros_like(y_TD).index_copy(0, order_T, y_TD)

    def _run(self, x_TD: Tensor, routing: MergedRouting) -> Tensor:
        weights = self.gate_up_proj, self.down_proj, routing.merge_BME
        x_TD, gate_up_E2FD, down_EDF, merge_BME = autocast_tensors(x_TD, *weights)
        (B, M, E), D, S, segment = merge_BME.shape, x_TD.shape[1], routing.seq_len, routing.segment
        merge_CE = merge_BME.reshape(B * M, E).to(gate_up_E2FD.dtype)
        gate_up_C2FD = (merge_CE @ gate_up_E2FD.flatten(1)).view(B * M, *gate_up_E2FD.shape[1:])
        down_CDF = (merge_CE @ down_EDF.flatten(1)).view(B * M, *down_EDF.shape[1:])
        x_CSD = F.pad(x_TD.view(B, S, D), (0, 0, 0, M * segment - S)).view(B * M, segment, D)
        gate_CSF, up_CSF = torch.bmm(x_CSD, gate_up_C2FD.mT).chunk(2, dim=-1)
        y_CSD = torch.bmm(F.silu(gate_CSF) * up_CSF, down_CDF.mT)
        return y_CSD.view(B, M * segment, D)[:, :S].reshape(x_TD.shape)
