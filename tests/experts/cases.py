"""Problems for expert execution, and what every backend must give on them.

Legend: T tokens, D model width, F expert width, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import reference
import torch

from remoe.errors import ConfigError
from remoe.experts import naive_experts, resolve_backend
from remoe.routing.assignment import Assignment

SHAPES = {
    "odd": (63, 60, 36, 5, 0.4),
    "even": (63, 80, 48, 5, 0.4),
    "one token": (1, 60, 36, 5, 0.5),
    "one expert": (63, 60, 36, 1, 0.5),
    "all on": (63, 60, 36, 5, 1.0),
    "all off": (63, 60, 36, 5, 0.0),
    "width one": (9, 1, 1, 3, 0.5),
    "many experts": (63, 16, 8, 64, 0.05),
}


def problem(T, D, F, E, density, dtype=torch.float32, device="cpu"):
    """x, gate_up, down and (T, E) gates, and which pairs are active."""
    active_TE = torch.rand(T, E, device=device) < density
    gate_TE = torch.rand(T, E, device=device).mul(active_TE).requires_grad_()
    x = torch.randn(T, D, dtype=dtype, device=device, requires_grad=True)
    gate_up = torch.randn(E, 2 * F, D, dtype=dtype, device=device).div(D**0.5).requires_grad_()
    down = torch.randn(E, D, F, dtype=dtype, device=device).div(F**0.5).requires_grad_()
    return (x, gate_up, down, gate_TE), active_TE


def with_room(assignment):
    """The same pairs in lists with room for every possible one, as on CUDA; what stands behind them must not count."""
    room = assignment.num_tokens * assignment.num_experts - assignment.token_N.shape[0]
    none_N = assignment.token_N.new_full((room,), assignment.num_experts)
    return Assignment(
        torch.cat((assignment.token_N, none_N)),
        torch.cat((assignment.expert_N, none_N)),
        torch.cat((assignment.gate_N, assignment.gate_N.new_full((room,), torch.nan))),
        assignment.count_E,
        assignment.num_tokens,
    )


def run(backend, leaves, active_TE, dy, room=False):
    """Output and the gradients of all leaves."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, gate_up, down, gate_TE = leaves
    assignment = Assignment.from_gates(gate_TE, active_TE)
    y = backend(x, gate_up, down, with_room(assignment) if room else assignment)
    y.backward(dy)
    return y, [leaf.grad for leaf in leaves]


def check_equals_naive(backend, leaves, active_TE, tolerance, room=False):
    """Output and all gradients are those of the specification in float64; returns the gradients."""
    dy = torch.randn_like(leaves[0])
    exact = run(naive_experts, [leaf.double() for leaf in leaves], active_TE, dy.double())
    # Freed memory that may be handed out as "empty"; CUDA's allocator takes small blocks from places of their own.
    poison = [torch.full((n,), torch.nan, device=dy.device) for n in [4_000_000] + [250_000] * 16 + [2_000] * 200]
    del poison
    y, grads = run(backend, leaves, active_TE, dy, room)
    assert y.dtype == leaves[0].dtype
    assert reference.relative_error(y, exact[0]) < tolerance
    for name, leaf, grad, expected in zip(("x", "gate_up", "down", "gate"), leaves, grads, exact[1], strict=True):
        assert grad is not None, name
        assert grad.dtype == leaf.dtype, name
        assert reference.relative_error(grad, expected) < tolerance, name
    return grads


def check_repeats(backend, leaves, active_TE):
    """Two runs agree bit for bit."""
    dy = torch.randn_like(leaves[0])
    first, second = (run(backend, leaves, active_TE, dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Context in which it is an error that the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def skip_unless_able(backend, x, down, **options):
    """Skips where the backend, a partial `run_experts`, cannot run these tensors; options as of `resolve_backend`."""
    try:
        resolve_backend(backend.keywords["backend"], "cpu", x.dtype, *down.shape[1:], **options)
    except ConfigError as error:
        pytest.skip(str(error))
