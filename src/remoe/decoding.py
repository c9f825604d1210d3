"""A layer on a few tokens without gradients, as in generation: from gates to the output, without lists of pairs.

What remains in Python then takes as long as reading the weights of small experts, so the routing is only made when
something asks for it.

Legend: T tokens, D model width, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from remoe.experts import Experts
from remoe.experts.cpu.backend import few_tokens
from remoe.experts.packed import is_packed, is_quantised
from remoe.routing.assignment import LateRouting, Routing, strong

MOST_TOKENS = 64


def limits(threshold: float | Tensor, cap: int | Tensor | None) -> bool:
    """Whether `Routing.pruned` by these may leave a pair out."""
    return isinstance(threshold, Tensor) or threshold > 0 or cap is not None


def decode(
    layer: Any,
    x_TD: Tensor,
    mask_T: Tensor | None,
    threshold: float | Tensor = 0.0,
    cap: int | Tensor | None = None,
) -> tuple[Tensor, Routing] | None:
    """Output, without that of a shared expert, and routing of a layer; None where the usual way must be taken.

    Output and gates are bit for bit those of the usual way; the output of weights in 8 or 4 bits only nearly.

    Args:
        layer: a `MoE`. Its weights may be sharded or adapted, and its parts wrapped: then None.
        x_TD, mask_T: as a router is given them.
        threshold, cap: as `Routing.pruned` takes them.
    """
    router, experts = layer.router, layer.experts
    if (
        torch.compiler.is_compiling()
        or layer.training
        or type(experts) is not Experts
        or experts.backend not in ("auto", "cpu")
        or not (_is_plain(router) and _is_plain(experts))
        or (dist.is_available() and dist.is_initialized())  # weights may be sharded again before the routing is read
    ):
        return None
    weights = experts.gate_up_proj, experts.down_proj
    if not takes_few_tokens(x_TD, *weights) or (gate_TE := router.gates(x_TD)) is None:
        return None
    if mask_T is not None:
        gate_TE = gate_TE.masked_fill(~mask_T[:, None], 0)
    limited = limits(threshold, cap)
    if limited:
        gate_TE = gate_TE * strong(gate_TE, threshold, cap)
    y_TD = few_tokens(x_TD.contiguous(), gate_TE.contiguous(), *weights)
    if y_TD is None:
        return None
    tensors = {name: t for name, t in (*router._parameters.items(), *router._buffers.items()) if t is not None}
    if not limited:
        return y_TD, LateRouting(lambda: _route(router, tensors, x_TD, mask_T))
    return y_TD, LateRouting(lambda: _route(router, tensors, x_TD, mask_T).pruned(threshold, cap))


def takes_few_tokens(x_TD: Tensor, *weights: Any) -> bool:
    """Whether `remoe.experts.cpu.backend.few_tokens` is the way to run these tokens, unless it finds too many pairs."""
    return (
        not torch.compiler.is_compiling()  # first: a comparison would fix a symbolic T
        and not torch.is_grad_enabled()
        and x_TD.shape[0] <= MOST_TOKENS
        and x_TD.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and type(x_TD) is Tensor
        and all(_has_kernel(weight, x_TD.dtype) for weight in weights)
    )


def _has_kernel(weight: Any, dtype: torch.dtype) -> bool:
    """Whether the kernel for a few tokens of this dtype takes the weight."""
    if type(weight) is nn.Parameter:
        return weight.is_contiguous() and (weight.dtype is dtype or is_packed(weight))
    scale = getattr(weight, "scale", None)
    per_row = scale is not None and scale.shape == (*weight.shape[:-1], 1)
    return is_quantised(weight) and per_row and weight.qdata.dtype is torch.int8 and weight.qdata.is_contiguous()


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module calls its class's `forward` and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@torch.no_grad()
def _route(router: nn.Module, tensors: dict[str, Tensor], x_TD: Tensor, mask_T: Tensor | None) -> Routing:
    """The routing at evaluation by these weights, whatever has become of the router since."""
    training, router.training = router.training, False
    try:
        return functional_call(router, tensors, (x_TD, mask_T))
    finally:
        router.training = training
