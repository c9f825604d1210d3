"""The steps between the matrix products of one block of pairs: gather, SwiGLU with the gate, and adding to the tokens.

Legend: T tokens, D model width, F expert width, N listed pairs, m pairs of one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.experts.cpu.build import Kernels


@dataclass(frozen=True, slots=True)
class Block:
    """Pairs [start, end) of one expert; `first` when they are the expert's first ones."""

    expert: int
    start: int
    end: int
    first: bool

    @property
    def size(self) -> int:
        return self.end - self.start


class CompiledSteps:
    """The steps by steps.cpp."""

    def __init__(self, kernels: Kernels, token_N: Tensor) -> None:
        self.kernels, self.token_N = kernels, token_N  # the address lives as long as its tensor
        self.token = token_N.data_ptr()

    def gather(self, x_TD: Tensor, block: Block, out_mD: Tensor) -> None:
        token = self.token + 8 * block.start
        self.kernels.gather(x_TD.data_ptr(), token, block.size, x_TD.shape[1], out_mD.data_ptr())

    def scatter_add(self, out_mD: Tensor, block: Block, y_TD: Tensor) -> None:
        token = self.token + 8 * block.start
        self.kernels.scatter_add(out_mD.data_ptr(), token, block.size, y_TD.shape[1], y_TD.data_ptr())

    def swiglu(self, pre_m2F: Tensor, gate_N: Tensor, block: Block, hidden_mF: Tensor) -> None:
        gate = gate_N.data_ptr() + 4 * block.start
        self.kernels.swiglu(pre_m2F.data_ptr(), gate, block.size, hidden_mF.shape[1], hidden_mF.data_ptr())

    def swiglu_backward(
        self,
        pre_m2F: Tensor,
        dhidden_mF: Tensor,
        gate_N: Tensor,
        block: Block,
        hidden_mF: Tensor,
        dpre_m2F: Tensor,
        dgate_N: Tensor,
    ) -> None:
        at = 4 * block.start
        inputs = pre_m2F.data_ptr(), dhidden_mF.data_ptr(), gate_N.data_ptr() + at
        outputs = hidden_mF.data_ptr(), dpre_m2F.data_ptr(), dgate_N.data_ptr() + at
        self.kernels.swiglu_backward(*inputs, block.size, hidden_mF.shape[1], *outputs)


class TorchSteps:
    """The steps by torch operations: for float64, other devices, and machines without a C++ compiler."""

    def __init__(self, token_N: Tensor) -> None:
        self.token_N = token_N

    def gather(self, x_TD: Tensor, block: Block, out_mD: Tensor) -> None:
        torch.index_select(x_TD, 0, self.token_N[block.start : block.end], out=out_mD)

    def scatter_add(self, out_mD: Tensor, block: Block, y_TD: Tensor) -> None:
        y_TD.index_add_(0, self.token_N[block.start : block.end], out_mD.to(y_TD.dtype))

    def swiglu(self, pre_m2F: Tensor, gate_N: Tensor, block: Block, hidden_mF: Tensor) -> None:
        a_mF, b_mF = pre_m2F.chunk(2, dim=1)
        torch.mul(F.silu(a_mF), b_mF, out=hidden_mF).mul_(gate_N[block.start : block.end, None])

    def swiglu_backward(
        self,
        pre_m2F: Tensor,
        dhidden_mF: Tensor,
        gate_N: Tensor,
        block: Block,
        hidden_mF: Tensor,
        dpre_m2F: Tensor,
        dgate_N: Tensor,
    ) -> None:
        (a_mF, b_mF), (da_mF, db_mF) = pre_m2F.chunk(2, dim=1), dpre_m2F.chunk(2, dim=1)
        gate_m1 = gate_N[block.start : block.end, None]
        sigmoid_mF = torch.sigmoid(a_mF)
        silu_mF = sigmoid_mF * a_mF
        torch.mul(silu_mF, b_mF, out=hidden_mF)
        torch.sum(dhidden_mF.to(gate_N.dtype) * hidden_mF, dim=1, out=dgate_N[block.start : block.end])
        hidden_mF.mul_(gate_m1)
        dhidden_mF.mul_(gate_m1)
        torch.mul(dhidden_mF, silu_mF, out=db_mF)
        # d silu(a) / da = sigmoid + silu * (1 - sigmoid)
        torch.mul(dhidden_mF.mul_(b_mF), silu_mF.mul_(1 - sigmoid_mF).add_(sigmoid_mF), out=da_mF)
