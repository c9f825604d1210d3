"""Experts with low-rank adapters, which run on the pairs: against the specification, which adds them to the weights."""

import pytest
import reference
import torch
from experts.cases import SHAPES, problem, skip_unless_able, with_room

from remoe.experts import naive_experts, run_experts
from remoe.experts.adapters import Adapters
from remoe.routing.assignment import Assignment

NAMES = ("x", "gates", "gate_up a", "gate_up b", "down a", "down b")
RANKS = {"r, q": (4, 3), "gate_up alone": (5, 0), "down alone": (0, 2)}
PATHS = ["cpu", "cpu with the other product", "cpu without passes", "cpu without kernels", "grouped"]


every_path = pytest.mark.parametrize("backend", PATHS, indirect=True)


def adapted_problem(shape, ranks, dtype=torch.float32):
    (x, gate_up, down, gates), active = problem(*shape, dtype)
    (E, F2, D), F, (r, q) = gate_up.shape, down.shape[2], ranks
    sizes = [(E, r, D), (r, E, F2), (E, q, F), (q, E, D)]
    adapters = [torch.randn(size, dtype=dtype).mul_(0.3) for size in sizes]
    return [x, gates, *adapters], (gate_up.detach(), down.detach()), active


def run(backend, leaves, weights, active, dy, room=False):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, gates, *adapters = leaves
    pairs = Assignment.from_gates(gates, active)
    y = backend(x, *weights, with_room(pairs) if room else pairs, adapters=Adapters(*adapters))
    y.backward(dy)
    return y, [leaf.grad for leaf in leaves]


def check(backend, leaves, weights, active, tolerance, room=False):
    dy = torch.randn_like(leaves[0])
    doubles = [leaf.double() for leaf in leaves], [weight.double() for weight in weights]
    expected, gradients = run(naive_experts, *doubles, active, dy.double())
    poison = [torch.full((n,), torch.nan) for n in [4_000_000] + [250_000] * 16 + [2_000] * 200]
    del poison
    y, found = run(backend, leaves, weights, active, dy, room)
    assert y.dtype == leaves[0].dtype
    assert reference.relative_error(y, expected) < tolerance
    for name, leaf, gradient, right in zip(NAMES, leaves, found, gradients, strict=True):
        assert gradient.shape == leaf.shape, name
        assert gradient.dtype == leaf.dtype, name
        assert not leaf.numel() or reference.relative_error(gradient, right) < tolerance, name
    return found


@every_path
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_weights_with_the_change_added(backend, shape, ranks):
    leaves, weights, active = adapted_problem(shape, ranks)
    skip_unless_able(backend, leaves[0], weights[1], adapted=True)
    check(backend, leaves, weights, active, 1e-5)


@every_path
def test_bfloat16(backend):
    leaves, weights, active = adapted_problem((31, 64, 40, 5, 0.4), (4, 3), torch.bfloat16)
    check(backend, leaves, weights, active, 2e-2)


@every_path
@pytest.mark.parametrize("stored", [0, 20, 64, None])
def test_recomputed_and_divided_pairs(backend, stored, monkeypatch):
    """Blocks of a few pairs, so that experts have several, in several windows; pre-activations that are not stored."""
    for name, value in {"BLOCK": 7, "MIN_BLOCK": 4, "LEAST_BLOCK": 2, "WINDOW": 8}.items():
        monkeypatch.setattr(f"remoe.experts.cpu.passes.{name}", value)
    monkeypatch.setattr("remoe.experts.windows.MIN_WINDOW", 16)
    monkeypatch.setattr("remoe.experts.windows.MIN_STORED_WINDOW", 1)
    leaves, weights, active = adapted_problem((41, 32, 16, 5, 0.6), (4, 3))
    active[:, 2] = False
    backend.keywords["stored"] = stored
    gradients = check(backend, leaves, weights, active, 1e-5, room=backend.keywords["backend"] == "grouped")
    for part in (gradients[2][2], gradients[3][:, 2], gradients[4][2], gradients[5][:, 2]):
        assert not part.any()


@pytest.mark.parametrize("backend", ["cpu", "grouped"], indirect=True)
def test_two_runs_are_bitwise_equal(backend):
    leaves, weights, active = adapted_problem((300, 64, 32, 5, 0.6), (4, 3))
    dy = torch.randn_like(leaves[0])
    first, second = (run(backend, leaves, weights, active, dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_gradcheck():
    leaves, weights, active = adapted_problem((5, 4, 3, 3, 0.6), (2, 1), torch.float64)
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def function(x, gates, *adapters):
        return run_experts(x, *weights, Assignment.from_gates(gates, active), "cpu", adapters=Adapters(*adapters))

    assert torch.autograd.gradcheck(function, leaves)
