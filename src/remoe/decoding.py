"""A layer on a few tokens without gradients, as in generation: from gates to the output, without lists of pairs.

What remains in Python then takes as long as reading the weights of small experts, so the routing is only made when
something asks for it. On CUDA two kernels take the whole layer, router and shared expert included, also in graphs.

Legend: T tokens, D model width, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from remoe.experts import BACKENDS, Experts, resolve_backend
from remoe.experts.cpu.backend import few_tokens
from remoe.experts.packed import is_packed, is_quantised
from remoe.routing.assignment import LateRouting, Routing, strong
from remoe.routing.base import GateRule, Router

MOST_TOKENS = 64
MOST_EXPERTS = {2: 256, 4: 64}  # on CUDA, by bytes of a number: more of float32 take half a minute to compile


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
    """Output and routing of a layer; None where the usual way must be taken.

    On a CPU, output and gates are bit for bit those of the usual way, but for weights in 8 or 4 bits. On CUDA they are
    nearly: the kernels sum in another order, and round less.

    Args:
        layer: a `MoE`. Its weights may be sharded or adapted, and its parts wrapped: then None.
        x_TD, mask_T: as a router is given them.
        threshold, cap: as `Routing.pruned` takes them.
    """
    router, experts = layer.router, layer.experts
    if layer.training or type(experts) is not Experts or not isinstance(router, Router):
        return None
    on_cpu = x_TD.device.type == "cpu" and experts.backend != "triton"  # or else in Triton's interpreter
    if (
        (on_cpu and torch.compiler.is_compiling())
        or experts.backend not in ("auto", "cpu" if on_cpu else "triton")
        or not (_is_plain(router) and _is_plain(experts))
        or (dist.is_available() and dist.is_initialized())  # weights may be sharded again before the routing is read
    ):
        return None
    limited = limits(threshold, cap)
    gate_TE, rule = None, None if on_cpu or limited else router.gate_rule()
    weights = experts.gate_up_proj, experts.down_proj
    if not (takes_few_tokens(x_TD, *weights) if on_cpu else takes_triton(x_TD, *weights, backend=experts.backend)):
        return None
    if rule is None:
        if (gate_TE := router.gates(x_TD)) is None:
            return None
        if mask_T is not None:
            gate_TE = gate_TE.masked_fill(~mask_T[:, None], 0)
        if limited:
            gate_TE = gate_TE * strong(gate_TE, threshold, cap)
    shared = layer.shared_expert
    if on_cpu:
        assert gate_TE is not None
        y_TD = few_tokens(x_TD.contiguous(), gate_TE.contiguous(), *weights)
        if y_TD is None:
            return None
    elif shared is not None and _is_plain(shared) and takes_triton(x_TD, *_weights(shared), backend=shared.backend):
        y_TD, shared = run_triton(x_TD, mask_T, gate_TE, rule, *weights, *_weights(shared)), None
    else:
        y_TD = run_triton(x_TD, mask_T, gate_TE, rule, *weights)
    if shared is not None:
        y_TD = y_TD + shared(x_TD)
    if torch.compiler.is_compiling():  # what a graph does not use of it, it does not compute
        made = router(x_TD, mask_T)
        return y_TD, made.pruned(threshold, cap) if limited else made
    tensors = {name: t for name, t in (*router._parameters.items(), *router._buffers.items()) if t is not None}
    if not limited:
        return y_TD, LateRouting(lambda: _route(router, tensors, x_TD, mask_T))
    return y_TD, LateRouting(lambda: _route(router, tensors, x_TD, mask_T).pruned(threshold, cap))


def decode_by_gates(x_TD: Tensor, gate_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor | None:
    """The experts' output for a few tokens, from gates; None where the usual way must be taken.

    Args:
        x_TD: (T, D).
        gate_TE: (T, E), zero where there is no pair.
        gate_up_E2FD, down_EDF: the experts' weights.
    """
    if takes_few_tokens(x_TD, gate_up_E2FD, down_EDF):
        return few_tokens(x_TD.contiguous(), gate_TE.contiguous(), gate_up_E2FD, down_EDF)
    if takes_triton(x_TD, gate_up_E2FD, down_EDF):
        return run_triton(x_TD, None, gate_TE, None, gate_up_E2FD, down_EDF)
    return None


def run_triton(
    x_TD: Tensor, mask_T: Tensor | None, gate_TE: Tensor | None, rule: GateRule | None, *weights: Tensor
) -> Tensor:
    """A whole layer by two kernels: from gates, or by the rule without the tokens that the mask leaves out.

    The weights are gate_up and down of the experts, and perhaps those of a shared one.
    """
    run = BACKENDS["triton"].decode
    assert run is not None
    return run(x_TD, mask_T, gate_TE, *(rule or _GIVEN), *weights, *(None,) * (4 - len(weights)))


_GIVEN = ("given", None, None, None, 0, 1.0, False)  # in place of a rule


def takes_triton(x_TD: Tensor, gate_up_E2FD: Any, down_EDF: Any, backend: str = "auto") -> bool:
    """Whether `run_triton` can run these tokens and weights."""
    return (
        (x_TD.device.type == "cuda" or backend == "triton")
        and not torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and x_TD.shape[0] <= MOST_TOKENS
        and not torch.is_autocast_enabled(x_TD.device.type)
        and type(gate_up_E2FD) is type(down_EDF) is nn.Parameter
        and gate_up_E2FD.dtype is down_EDF.dtype is x_TD.dtype
        and gate_up_E2FD.is_contiguous()
        and down_EDF.is_contiguous()
        and down_EDF.shape[0] <= MOST_EXPERTS.get(x_TD.element_size(), 0)
        and _resolved(backend, x_TD.device.type, x_TD.dtype, *down_EDF.shape[1:]) == "triton"
    )


@torch.compiler.assume_constant_result  # its log would break a graph
def _resolved(name: str, device_type: str, dtype: torch.dtype, d_model: int, d_ffn: int) -> str:
    return resolve_backend(name, device_type, dtype, d_model, d_ffn)


def _weights(experts: Experts) -> tuple[Tensor, Tensor]:
    return experts.gate_up_proj, experts.down_proj


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
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@torch.no_grad()
def _route(router: nn.Module, tensors: dict[str, Tensor], x_TD: Tensor, mask_T: Tensor | None) -> Routing:
    """The routing at evaluation by these weights, whatever has become of the router since."""
    training, router.training = router.training, False
    try:
        return functional_call(router, tensors, (x_TD, mask_T))
    finally:
        router.training = training
