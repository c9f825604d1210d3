"""Ragged expert execution as two custom operators, forward and backward, whatever the backend.

PyTorch's tracers (`torch.compile`, `torch.export`, fake tensors) see two opaque operators whose output shapes follow
from their input shapes: nothing in them depends on how many pairs were routed. Autograd knows the second as the
derivative of the first.

A backend is a module with

    forward(x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pair_TE, stored) -> y_TD, pre_C2F
    backward(dy_TD, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pair_TE, pre_C2F, weights)
        -> dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N

where the second and third are empty, and their products not made, if `weights` is false (frozen experts), and where
C = min(N, stored): the pre-activations of the first C pairs are kept for the backward pass, those of the others
are computed again. That bounds the memory when far more experts are active than wanted. A backend writes no
pre-activation of pairs that do not exist and reads none; the same holds for an expert of which not all pairs fit in C.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs (routed pairs, then padding), C stored pairs.
"""

from types import ModuleType

import torch
from torch import Tensor

from remoe.experts.backends import backend_module, resolve_backend


def ragged_experts(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pair_TE: Tensor | None,
    *,
    stored: int,
    backend: str,
) -> Tensor:
    """Runs the routed pairs and sums them per token; differentiable in the first four arguments.

    Args:
        x_TD, gate_up_E2FD, down_EDF: (T, D), (E, 2F, D), (E, D, F), of one dtype.
        gate_N, token_N, count_E, pair_TE: as in `Assignment`.
        stored: pairs whose pre-activations may be kept for the backward pass; the others' are computed again.
        backend: "auto", "loop", "grouped" or "triton".

    Returns:
        (T, D); zero rows for tokens without an expert.
    """
    inputs = (x_TD, gate_up_E2FD, down_EDF, gate_N.to(torch.promote_types(x_TD.dtype, torch.float32)))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        stored = 0
    return _forward(*inputs, token_N, count_E, pair_TE, stored, backend)[0]


def _module(backend: str, x_TD: Tensor, down_EDF: Tensor) -> ModuleType:
    # Here and not in the caller: tracers see neither the choice nor its log.
    name = resolve_backend(backend, x_TD.device.type, x_TD.dtype, *down_EDF.shape[1:])
    return backend_module(name)


@torch.library.custom_op("remoe::experts_forward", mutates_args=())
def _forward(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pair_TE: Tensor | None,
    stored: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _module(backend, x_TD, down_EDF).forward(
        x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pair_TE, stored
    )


@_forward.register_fake
def _(x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pair_TE, stored, backend):
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    return y_TD, x_TD.new_empty(torch.sym_min(token_N.shape[0], stored), gate_up_E2FD.shape[1])


@torch.library.custom_op("remoe::experts_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pair_TE: Tensor | None,
    pre_C2F: Tensor,
    backend: str,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _module(backend, x_TD, down_EDF).backward(
        dy_TD, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pair_TE, pre_C2F, weights
    )


@_backward.register_fake
def _(dy_TD, x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, pair_TE, pre_C2F, backend, weights):
    dx_TD, dgate_N = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x_TD, gate_N))
    return dx_TD, *empty_gradients(gate_up_E2FD, down_EDF, weights), dgate_N


def empty_gradients(gate_up_E2FD: Tensor, down_EDF: Tensor, weights: bool) -> tuple[Tensor, Tensor]:
    """Room for the gradients of both weights; none where they are not wanted."""
    if not weights:
        return gate_up_E2FD.new_empty(0), down_EDF.new_empty(0)
    form = torch.contiguous_format
    return torch.empty_like(gate_up_E2FD, memory_format=form), torch.empty_like(down_EDF, memory_format=form)


def _setup_context(ctx, inputs, output) -> None:
    *saved, _, ctx.backend = inputs
    ctx.save_for_backward(*saved, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy_TD, _):
    if dy_TD is None:
        return (None,) * 9
    weights = any(ctx.needs_input_grad[1:3])
    dx_TD, *dweights, dgate_N = _backward(dy_TD.contiguous(), *ctx.saved_tensors, ctx.backend, weights)
    return dx_TD, *(dweights if weights else (None, None)), dgate_N, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
