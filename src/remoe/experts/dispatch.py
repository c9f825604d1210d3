"""The backends, which of them "auto" takes, and the custom operators that make their two passes differentiable.

PyTorch's tracers (`torch.compile`, `torch.export`, fake tensors) see two opaque operators, whose output shapes follow
from their input shapes: nothing in them depends on how many pairs were routed. Autograd knows the second as the
derivative of the first. Each backend has such a pair of operators, whose bodies are its own two functions; for graphs
there is one more pair, which chooses the backend when it runs, so that a graph holds neither the choice nor its log.

`remoe.experts.contract` says what a backend is given and what it returns. Legend: T tokens, D model width, F expert
width, E experts, N listed pairs, C stored pairs.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from remoe.errors import ConfigError
from remoe.experts.adapters import Adapters
from remoe.experts.contract import Backend, Problem
from remoe.experts.cpu.backend import BACKEND as CPU
from remoe.experts.naive import BACKEND as NAIVE
from remoe.operators import operator_name

# Modules beside this one that an exported model's folder does not have.
_OPTIONAL = {"grouped": "grouped", "triton": "triton.backend", "sonic": "sonic"}


def _backends() -> dict[str, Backend]:
    found = {"naive": NAIVE, "cpu": CPU}
    # "remoe.experts." in the package; "....remoe_experts_" in the flat folder of an exported model.
    prefix = __name__.removesuffix("dispatch")
    for name, path in _OPTIONAL.items():
        module = prefix + path.replace(".", prefix[-1])
        if find_spec(module) is not None:
            found[name] = import_module(module).BACKEND
    return found


BACKENDS = _backends()
ALIASES = {"loop": "cpu"}  # of version 0.1.0
_AUTO = {"cuda": ("triton", "grouped", "cpu")}  # in the order of preference; elsewhere "cpu"

logger = logging.getLogger(__name__)


def check_backend(name: str) -> str:
    """The name that `name` stands for: itself, or that of the backend of which it is an alias.

    Raises:
        ConfigError: unless it is "auto", a backend or an alias.
    """
    known = ("auto", *BACKENDS)
    if not isinstance(name, str) or ALIASES.get(name, name) not in known:
        raise ConfigError(f"unknown experts backend {name!r}; choose one of: {', '.join(known)}")
    return ALIASES.get(name, name)


@cache
def resolve_backend(
    name: str, device_type: str, dtype: torch.dtype, d_model: int, d_ffn: int, *, adapted: bool = False
) -> str:
    """The backend to run: the one named, or the first that "auto" finds able. The choice is logged, once.

    With `adapted`, it must be able to compute with low-rank adapters.

    Raises:
        ConfigError: for an unknown name, or when a backend that was asked for cannot run; the message says why.
    """
    asked, name = name, check_backend(name)
    candidates = _AUTO.get(device_type, ("cpu",)) if name == "auto" else (name,)
    passed_over = ""
    for candidate in candidates:
        if candidate not in BACKENDS:
            continue
        reason = BACKENDS[candidate].obstacle(torch.device(device_type), dtype, d_model, d_ffn)
        if reason is None and adapted and BACKENDS[candidate].adapted_forward is None:
            reason = "it cannot compute with low-rank adapters"
        if reason is None:
            break
        if name != "auto":
            raise ConfigError(f"experts backend {name!r} cannot run here: {reason}")
        passed_over += f"; not {candidate}: {reason}"
    where = f"{device_type} in {str(dtype).removeprefix('torch.')}{' with adapters' if adapted else ''}"
    logger.info("experts backend: %s (asked for: %s) on %s%s", candidate, asked, where, passed_over)
    return candidate


class Operators(NamedTuple):
    """The two passes of a `Backend`, with its arguments; autograd knows the second as the derivative of the first."""

    forward: CustomOpDef
    backward: CustomOpDef


def _register(name: str, forward: Callable, backward: Callable, first: str = "") -> Operators:
    # `first`: further arguments before the others.
    tensors = ", ".join(f"Tensor{'?' * (field == 'pair_TE')} {field}" for field in Problem._fields)
    forward_op = custom_op(
        operator_name(f"{name}_forward"), forward, mutates_args=(),
        schema=f"({first}SymInt stored, {tensors}) -> (Tensor, Tensor)",
    )  # fmt: skip
    backward_op = custom_op(
        operator_name(f"{name}_backward"), backward, mutates_args=(),
        schema=f"({first}bool weights, Tensor dy_TD, Tensor pre_C2F, {tensors}) -> (Tensor, Tensor, Tensor, Tensor)",
    )  # fmt: skip
    ours = len(Problem._fields)

    @forward_op.register_fake
    def _(*arguments):
        p = Problem._make(arguments[-ours:])
        stored = torch.sym_min(p.token_N.shape[0], arguments[-ours - 1])
        return _empty_like(p.x_TD), p.x_TD.new_empty(stored, p.gate_up_E2FD.shape[1])

    @backward_op.register_fake
    def _(*arguments):
        p = Problem._make(arguments[-ours:])
        weights = arguments[-ours - 3]
        return _empty_like(p.x_TD), *p.new_weight_gradients(weights), _empty_like(p.gate_N)

    def setup_context(ctx, inputs, output) -> None:
        ctx.first = inputs[: -ours - 1]
        ctx.save_for_backward(output[1], *inputs[-ours:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dy_TD, _):
        before = (None,) * (len(ctx.first) + 1)
        if dy_TD is None:
            return *before, *(None,) * ours
        weights = any(ctx.needs_input_grad[len(before) :][1:3])
        dx_TD, *dweights, dgate_N = backward_op(*ctx.first, weights, dy_TD.contiguous(), *ctx.saved_tensors)
        return *before, dx_TD, *(dweights if weights else (None, None)), dgate_N, None, None, None

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    return Operators(forward_op, backward_op)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


OPERATORS = {
    name: _register(f"experts_{name}", backend.forward, backend.backward)
    for name, backend in BACKENDS.items()
    if backend.forward is not None and backend.backward is not None
}


def _forward(name: str, stored: int, *problem: Tensor | None) -> tuple[Tensor, Tensor]:
    return _chosen(name, problem).forward(stored, *problem)


def _backward(
    name: str, weights: bool, dy_TD: Tensor, pre_C2F: Tensor, *problem: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _chosen(name, problem).backward(weights, dy_TD, pre_C2F, *problem)


def _chosen(name: str, problem: tuple[Tensor | None, ...]) -> Operators:
    p = Problem._make(problem)
    return OPERATORS[resolve_backend(name, p.x_TD.device.type, p.x_TD.dtype, *p.down_EDF.shape[1:])]


def _adapted_forward(name: str, stored: int, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    p, adapters = _split(tensors)
    forward = _adapted(name, p).adapted_forward
    assert forward is not None
    return forward(stored, adapters, *p)


def _adapted_backward(name: str, dy_TD: Tensor, pre_C2F: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    p, adapters = _split(tensors)
    backward = _adapted(name, p).adapted_backward
    assert backward is not None
    return backward(dy_TD, pre_C2F, adapters, *p)


def _split(tensors: tuple) -> tuple[Problem, Adapters]:
    first = len(Problem._fields)
    return Problem._make(tensors[:first]), Adapters._make(tensors[first:])


def _adapted(name: str, p: Problem) -> Backend:
    where = p.x_TD.device.type, p.x_TD.dtype, *p.down_EDF.shape[1:]
    return BACKENDS[resolve_backend(name, *where, adapted=True)]


def _register_adapted() -> Operators:
    # The two passes with low-rank adapters; the weights are frozen.
    tensors = ", ".join(f"Tensor{'?' * (f == 'pair_TE')} {f}" for f in (*Problem._fields, *Adapters._fields))
    forward_op = custom_op(
        operator_name("experts_adapted_forward"), _adapted_forward, mutates_args=(),
        schema=f"(str backend, SymInt stored, {tensors}) -> (Tensor, Tensor)",
    )  # fmt: skip
    backward_op = custom_op(
        operator_name("experts_adapted_backward"), _adapted_backward, mutates_args=(),
        schema=f"(str backend, Tensor dy_TD, Tensor pre_C2F, {tensors}) -> ({', '.join(['Tensor'] * 6)})",
    )  # fmt: skip

    @forward_op.register_fake
    def _(backend, stored, *tensors):
        p, _ = _split(tensors)
        stored = torch.sym_min(p.token_N.shape[0], stored)
        return _empty_like(p.x_TD), p.x_TD.new_empty(stored, p.gate_up_E2FD.shape[1])

    @backward_op.register_fake
    def _(backend, dy_TD, pre_C2F, *tensors):
        p, adapters = _split(tensors)
        return _empty_like(p.x_TD), _empty_like(p.gate_N), *adapters.new_gradients()

    def setup_context(ctx, inputs, output) -> None:
        ctx.backend = inputs[0]
        ctx.save_for_backward(output[1], *inputs[2:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dy_TD, _):
        if dy_TD is None:
            return (None,) * (2 + len(Problem._fields) + len(Adapters._fields))
        dx_TD, dgate_N, *dadapters = backward_op(ctx.backend, dy_TD.contiguous(), *ctx.saved_tensors)
        return None, None, dx_TD, None, None, dgate_N, None, None, None, *dadapters

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    return Operators(forward_op, backward_op)


ADAPTED = _register_adapted()
# For graphs: the name of a backend, or "auto", comes before the other arguments.
TRACED = _register("experts", _forward, _backward, first="str backend, ")
