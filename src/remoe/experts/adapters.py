"""Low-rank adapters of experts (LoRA, arXiv 2106.09685), computed on the routed pairs alone.

An expert's weight W of O rows and I columns becomes W + b^T a. To add that to the weights of all experts costs in each
step as much memory as they have, and in the backward pass the gradient of each. Here a pair's input goes through a and
b beside W: y = W x + b^T (a x).

The layout is that of PEFT's weights, but that b is transposed. `remoe.integrations.lora` brings them here.

Legend: T tokens, D model width, F expert width, E experts, r rank of the adapter of gate_up, q of down, I and O columns
and rows of an expert's weight, m pairs of one expert.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.experts.packed import is_quantised
from remoe.matmul import linear

PROJECTIONS = ("gate_up_proj", "down_proj")
_WAITING = "remoe_adapters"  # an attribute of experts modules, while they are adapted: {weight's name: LowRank}


class LowRank(NamedTuple):
    """The change of one projection: b^T a for each expert.

    Attributes:
        a_ErI: (E, r, I).
        b_rEO: (r, E, O), scaled.
    """

    a_ErI: Tensor
    b_rEO: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.b_rEO.shape[0]

    @classmethod
    def nothing(cls, weight_EOI: Tensor) -> "LowRank":
        """Of rank 0, for a projection that is not adapted."""
        E, O_, I_ = weight_EOI.shape
        return cls(weight_EOI.new_empty(E, 0, I_), weight_EOI.new_empty(0, E, O_))

    def materialised(self) -> Tensor:
        """(E, O, I), the change itself."""
        return torch.einsum("reo,eri->eoi", self.b_rEO, self.a_ErI)

    def linear_of_first(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """x (W + b^T a)^T of expert 0; differentiable."""
        return linear(x_TI, weight_OI) + linear(x_TI, self.a_ErI[0].to(x_TI.dtype)) @ self.b_rEO[:, 0].to(x_TI.dtype)

    def add(self, e: int, in_mI: Tensor, out_mO: Tensor) -> None:
        """Adds the change's part to an expert's output."""
        if self.rank:
            out_mO.addmm_(in_mI @ self.a_ErI[e].t(), self.b_rEO[:, e])

    def add_transposed(self, e: int, dout_mO: Tensor, din_mI: Tensor) -> Tensor:
        """Adds the change's part to the gradient of an expert's input; returns the gradient of a times the input."""
        u_mr = dout_mO @ self.b_rEO[:, e].t()
        if self.rank:
            din_mI.addmm_(u_mr, self.a_ErI[e])
        return u_mr

    def add_gradients(self, e: int, in_mI: Tensor, dout_mO: Tensor, u_mr: Tensor, sums: "LowRank") -> None:
        """Adds an expert's gradients to those in `sums`; `u_mr` is what `add_transposed` returned."""
        if self.rank:
            sums.a_ErI[e].addmm_(u_mr.t(), in_mI)
            sums.b_rEO[:, e].addmm_((in_mI @ self.a_ErI[e].t()).t(), dout_mO)

    @classmethod
    def sum(cls, changes: "Sequence[LowRank]") -> "LowRank":
        """The sum of several changes, of the sum of their ranks."""
        if len(changes) == 1:
            return changes[0]
        return cls(torch.cat([a for a, _ in changes], dim=1), torch.cat([b for _, b in changes], dim=0))


class Adapters(NamedTuple):
    """The changes of both projections; those of rank 0 change nothing. In the dtype of x, on its device."""

    gate_up_a_ErD: Tensor
    gate_up_b_rE2F: Tensor
    down_a_EqF: Tensor
    down_b_qED: Tensor

    def contiguous(self) -> "Adapters":
        """The same, in contiguous tensors."""
        return Adapters(*(tensor.contiguous() for tensor in self))

    def new_gradients(self) -> "Adapters":
        """Uninitialised, contiguous."""
        return Adapters(*(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in self))

    @property
    def gate_up(self) -> LowRank:
        """That of gate_up."""
        return LowRank(self.gate_up_a_ErD, self.gate_up_b_rE2F)

    @property
    def down(self) -> LowRank:
        """That of down."""
        return LowRank(self.down_a_EqF, self.down_b_qED)


@contextmanager
def adapting(experts: nn.Module, weight: str, change: LowRank) -> Iterator[None]:
    """Context in which a call of an experts module computes with a changed weight.

    Args:
        experts: whose forward pass calls `take_adapters`.
        weight: "gate_up_proj" or "down_proj".
        change: of that weight.

    Raises:
        ConfigError: at the end, when the module has run without its adapter.
    """
    waiting: dict[str, LowRank] = vars(experts).setdefault(_WAITING, {})
    waiting[weight] = change
    try:
        yield
        if weight in waiting:
            kind = type(experts).__name__
            raise ConfigError(f"{kind} has run without the adapter of its {weight}: by experts other than remoe's")
    finally:
        waiting.pop(weight, None)
        if not waiting:
            vars(experts).pop(_WAITING, None)


def take_adapters(experts: nn.Module) -> Adapters | None:
    """The adapters with which this call of an experts module computes, if any.

    Args:
        experts: with frozen weights `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F).

    Raises:
        ConfigError: for adapted weights that are trained themselves, or quantised.
    """
    waiting = vars(experts).get(_WAITING)
    if not waiting:
        return None
    changes = []
    for name in PROJECTIONS:
        weight = getattr(experts, name)
        if is_quantised(weight):
            raise ConfigError("experts with quantised weights cannot compute with adapters on the pairs")
        if torch.is_grad_enabled() and weight.requires_grad:
            raise ConfigError(f"{name} has adapters on the pairs and is trained itself; freeze it, or leave it to PEFT")
        changes.append(waiting.pop(name, None) or LowRank.nothing(weight))
    return Adapters(*changes[0], *changes[1])
