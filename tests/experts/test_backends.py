"""Every backend against naive.py: output and all gradients, odd sizes, empty and full experts, poisoned memory."""

import functools

import pytest
import reference
import torch

from remoe.errors import ConfigError
from remoe.experts import Experts, naive_experts, run_experts
from remoe.routing.assignment import Assignment

FAST = ["loop", "loop without kernels"]
SHAPES = {
    "odd": (63, 60, 36, 5, 0.4),
    "one token": (1, 60, 36, 5, 0.5),
    "one expert": (63, 60, 36, 1, 0.5),
    "all on": (63, 60, 36, 5, 1.0),
    "all off": (63, 60, 36, 5, 0.0),
    "width one": (9, 1, 1, 3, 0.5),
    "many experts": (63, 16, 8, 64, 0.05),
}


def problem(T, D, F, E, density, dtype=torch.float32):
    active_TE = torch.rand(T, E) < density
    gate_TE = torch.rand(T, E).mul(active_TE).requires_grad_()
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(E, 2 * F, D, dtype=dtype).div(D**0.5).requires_grad_()
    down = torch.randn(E, D, F, dtype=dtype).div(F**0.5).requires_grad_()
    return (x, gate_up, down, gate_TE), active_TE


@pytest.fixture
def backend(request, monkeypatch):
    """A backend as a function."""
    name, _, variant = request.param.partition(" ")
    if variant == "without kernels":
        monkeypatch.setattr(f"remoe.experts.{name}.compiled_kernels", lambda dtype: None)
    return functools.partial(run_experts, backend=name)


every_backend = pytest.mark.parametrize("backend", FAST, indirect=True)


def run(backend, leaves, active_TE, dy):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, gate_up, down, gate_TE = leaves
    y = backend(x, gate_up, down, Assignment.from_gates(gate_TE, active_TE))
    y.backward(dy)
    return y, [leaf.grad for leaf in leaves]


@every_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_naive_in_float64(backend, shape):
    leaves, active = problem(*shape)
    dy = torch.randn(shape[0], shape[1])
    exact = run(naive_experts, [leaf.double() for leaf in leaves], active, dy.double())
    poison = torch.full((4_000_000,), torch.nan)  # freed memory that a backend may be handed as "empty"
    del poison
    y, grads = run(backend, leaves, active, dy)
    assert reference.relative_error(y, exact[0]) < 1e-5
    for name, grad, expected in zip(("x", "gate_up", "down", "gate"), grads, exact[1], strict=True):
        assert grad is not None, name
        assert reference.relative_error(grad, expected) < 1e-5, name


def test_naive_equals_the_reference_loops():
    leaves, active = problem(17, 12, 8, 3, 0.5, torch.float64)
    dy = torch.randn(17, 12, dtype=torch.float64)
    y, grads = run(naive_experts, [leaf.double() for leaf in leaves], active, dy)
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, gate_up, down, gate_TE = copies
    expected = reference.layer(x, gate_TE, gate_up, down)
    expected.backward(dy)
    assert reference.relative_error(y, expected) < 1e-12
    for grad, copy in zip(grads, copies, strict=True):
        assert reference.relative_error(grad, copy.grad) < 1e-12


@every_backend
def test_gradcheck(backend):
    leaves, active = problem(6, 4, 3, 3, 0.6, torch.float64)
    x, gate_up, down, gate_TE = leaves
    gate_TE = gate_TE.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: backend(*t[:3], Assignment.from_gates(t[3], active)), (x, gate_up, down, gate_TE)
    )


@every_backend
def test_bfloat16(backend):
    leaves, active = problem(63, 60, 36, 5, 0.4, torch.bfloat16)
    dy = torch.randn(63, 60).bfloat16()
    exact = run(naive_experts, [leaf.double() for leaf in leaves], active, dy.double())
    y, grads = run(backend, leaves, active, dy)
    assert y.dtype == torch.bfloat16
    assert grads[3].dtype == torch.float32
    assert reference.relative_error(y, exact[0]) < 1e-2
    for grad, expected in zip(grads, exact[1], strict=True):
        assert reference.relative_error(grad, expected) < 1e-2


@every_backend
def test_two_runs_are_bitwise_equal(backend):
    leaves, active = problem(63, 60, 36, 5, 0.4)
    dy = torch.randn(63, 60)
    first, second = (run(backend, leaves, active, dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@every_backend
def test_one_expert_takes_everything(backend):
    leaves, _ = problem(63, 60, 36, 5, 1.0)
    active = torch.zeros(63, 5, dtype=torch.bool)
    active[:, 3] = True
    dy = torch.randn(63, 60)
    exact = run(naive_experts, [leaf.double() for leaf in leaves], active, dy.double())
    y, grads = run(backend, leaves, active, dy)
    assert reference.relative_error(y, exact[0]) < 1e-5
    assert all(reference.relative_error(a, b) < 1e-5 for a, b in zip(grads, exact[1], strict=True))
    assert not grads[1][[0, 1, 2, 4]].any()


def test_unknown_backend():
    with pytest.raises(ConfigError, match="unknown experts backend 'cuda'"):
        Experts(4, 8, 8, backend="cuda")
