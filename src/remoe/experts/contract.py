"""What a backend of the experts is given, and what it must provide.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs (R routed pairs, then padding), C stored
pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The routed pairs of one layer with its tokens and weights: the tensor arguments of every backend, in this order.

    Attributes:
        x_TD: (T, D).
        gate_up_E2FD: (E, 2F, D), the gate projection's F rows before the up projection's; in x's dtype.
        down_EDF: (E, D, F), in x's dtype.
        gate_N: (N,), at least float32, weights of the pairs' outputs.
        token_N: (N,) int64, rows of the pairs' tokens; pairs are sorted by expert, then by token.
        count_E: (E,) int64, pairs per expert; they sum to R <= N. Entries behind the first R pairs mean nothing.
        pair_TE: (T, E) int32, place of each pair in the list, -1 where there is none; None: not known.
    """

    x_TD: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    gate_N: Tensor
    token_N: Tensor
    count_E: Tensor
    pair_TE: Tensor | None

    @classmethod
    def contiguous(cls, *problem: Tensor | None) -> "Problem":
        """The problem of these arguments, with contiguous tensors."""
        return cls._make([tensor if tensor is None else tensor.contiguous() for tensor in problem])

    def new_stored(self, stored: int) -> Tensor:
        """(C, 2F), uninitialised: the pre-activations of the first C = min(N, stored) pairs."""
        return self.x_TD.new_empty(min(self.token_N.shape[0], stored), self.gate_up_E2FD.shape[1])

    def new_weight_gradients(self, weights: bool) -> tuple[Tensor, Tensor]:
        """Uninitialised gradients of gate_up and down, contiguous; empty ones unless `weights`."""
        if not weights:
            return self.gate_up_E2FD.new_empty(0), self.down_EDF.new_empty(0)
        form = torch.contiguous_format
        dgate_up_E2FD = torch.empty_like(self.gate_up_E2FD, memory_format=form)
        return dgate_up_E2FD, torch.empty_like(self.down_EDF, memory_format=form)


@dataclass(frozen=True, slots=True)
class Backend:
    """One way of running experts: two passes that `remoe.experts.dispatch` makes differentiable, or one function.

    Attributes:
        obstacle: (device, dtype, d_model, d_ffn) -> why it cannot run there, or None when it can.
        forward: (stored, *problem) -> y_TD, pre_C2F. The pre-activations of the first C = min(N, stored) pairs are kept
            for the backward pass and those of the others recomputed, which bounds the memory when far more experts are
            active than the target. Nothing is written for pairs that do not exist; the same holds for an expert whose
            pairs do not all fit in C.
        backward: (weights, dy_TD, pre_C2F, *problem) -> dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N. dy is contiguous.
            Without `weights` (frozen experts) the second and third are empty and their products are not computed.
        function: (x_TD, gate_up_E2FD, down_EDF, assignment) -> y_TD, differentiable: instead of the two passes.
        adapted_forward: (stored, adapters, *problem) -> y_TD, pre_C2F: as `forward`, with low-rank `Adapters`.
        adapted_backward: (dy_TD, pre_C2F, adapters, *problem) -> dx_TD, dgate_N, and the gradients of the adapters, all
            contiguous. The weights are frozen.
        decode: (x_TD, mask_T, gate_TE, *gate_rule, gate_up_E2FD, down_EDF, shared_gate_up, shared_down) -> y_TD:
            a whole layer on few tokens without gradients, from gates or from a `GateRule`; see `remoe.decoding`.
    """

    obstacle: Callable[[torch.device, torch.dtype, int, int], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]] | None = None
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    function: Callable[..., Tensor] | None = None
    adapted_forward: Callable[..., tuple[Tensor, Tensor]] | None = None
    adapted_backward: Callable[..., tuple[Tensor, ...]] | None = None
    decode: Callable[..., Tensor] | None = None
