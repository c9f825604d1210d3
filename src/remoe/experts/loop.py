"""Sorted pairs, one GEMM per active expert and projection, in a single autograd function.

The gate multiplies the hidden activation, before the down projection: its gradient then needs no stored
expert output. The backward pass recomputes the activation from the stored pre-activations. Gathers and the
combine run once over all pairs; the combine is a segment sum per token in a fixed order, so two runs agree
bit for bit.

Legend: T tokens, D model width, F expert width, E experts, R routed pairs, r pairs of one expert.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from remoe.routing.assignment import Assignment


def loop_experts(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, assignment: Assignment) -> Tensor:
    """Same contract as `naive_experts`."""
    return _LoopExperts.apply(x_TD, gate_up_E2FD, down_EDF, assignment.gate_R, assignment.token_R, assignment.count_E)


class _LoopExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, gate_up_E2FD, down_EDF, gate_R, token_R, count_E):
        experts = _active_slices(count_E)
        F_ = down_EDF.shape[2]
        x_RD = x_TD[token_R]
        pre_R2F = x_TD.new_empty(token_R.shape[0], 2 * F_)
        for e, pairs in experts:
            torch.mm(x_RD[pairs], gate_up_E2FD[e].t(), out=pre_R2F[pairs])
        hidden_RF = F.silu(pre_R2F[:, :F_]).mul_(pre_R2F[:, F_:]).mul_(gate_R[:, None])
        out_RD = x_RD  # every slice of the gathered input has been read: its memory takes the outputs
        for e, pairs in experts:
            torch.mm(hidden_RF[pairs], down_EDF[e].t(), out=out_RD[pairs])

        ctx.experts = experts
        ctx.save_for_backward(x_TD, gate_up_E2FD, down_EDF, gate_R, token_R, pre_R2F)
        return _sum_per_token(out_RD, token_R, x_TD.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x_TD, gate_up_E2FD, down_EDF, gate_R, token_R, pre_R2F = ctx.saved_tensors
        F_ = down_EDF.shape[2]
        gate_RF, up_RF = pre_R2F[:, :F_], pre_R2F[:, F_:]
        sigmoid_RF = torch.sigmoid(gate_RF)
        silu_RF = sigmoid_RF * gate_RF
        hidden_RF = silu_RF * up_RF

        dy_RD = dy_TD[token_R]
        dhidden_RF = torch.empty_like(hidden_RF)
        ddown_EDF = torch.empty_like(down_EDF)
        gated_RF = torch.mul(hidden_RF, gate_R[:, None], out=torch.empty_like(hidden_RF))
        for e, pairs in ctx.experts:
            torch.mm(dy_RD[pairs], down_EDF[e], out=dhidden_RF[pairs])
            torch.mm(dy_RD[pairs].t(), gated_RF[pairs], out=ddown_EDF[e])
        dgate_R = (dhidden_RF.to(gate_R.dtype) * hidden_RF).sum(dim=1)
        dhidden_RF.mul_(gate_R[:, None])

        dpre_R2F = torch.empty_like(pre_R2F)
        torch.mul(dhidden_RF, silu_RF, out=dpre_R2F[:, F_:])
        # d silu(g) / dg = sigmoid(g) * (1 + g * (1 - sigmoid(g))) = sigmoid + silu * (1 - sigmoid)
        dsilu_RF = silu_RF.mul_(1 - sigmoid_RF).add_(sigmoid_RF)
        torch.mul(dhidden_RF.mul_(up_RF), dsilu_RF, out=dpre_R2F[:, :F_])

        x_RD = x_TD[token_R]
        dx_RD = dy_RD  # read for the last time above
        dgate_up_E2FD = torch.empty_like(gate_up_E2FD)
        for e, pairs in ctx.experts:
            torch.mm(dpre_R2F[pairs].t(), x_RD[pairs], out=dgate_up_E2FD[e])
            torch.mm(dpre_R2F[pairs], gate_up_E2FD[e], out=dx_RD[pairs])
        active = {e for e, _ in ctx.experts}
        for e in range(down_EDF.shape[0]):
            if e not in active:
                dgate_up_E2FD[e].zero_()
                ddown_EDF[e].zero_()
        return _sum_per_token(dx_RD, token_R, x_TD.shape[0]), dgate_up_E2FD, ddown_EDF, dgate_R, None, None


def _active_slices(count_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, slice of its pairs) for the experts that have pairs."""
    slices, start = [], 0
    for e, count in enumerate(count_E.tolist()):
        if count:
            slices.append((e, slice(start, start + count)))
        start += count
    return slices


def _sum_per_token(value_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    """(T, D): each token's sum over its pairs, in the order of its experts; zero for a token without pairs."""
    if token_R.shape[0] == 0:
        return value_RD.new_zeros(num_tokens, value_RD.shape[1])
    sorted_R, order_R = token_R.sort(stable=True)
    start_T = torch.searchsorted(sorted_R, torch.arange(num_tokens, device=token_R.device))
    # embedding_bag gathers and sums rows in one pass, in parallel over tokens and without atomics.
    return F.embedding_bag(order_R, value_RD, start_T, mode="sum")
