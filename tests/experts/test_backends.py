"""Every backend against naive.py: output and all gradients, odd sizes, empty and full experts, poisoned memory."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from experts.cases import SHAPES, check_equals_naive, check_repeats, problem, run, skip_unless_able
from packaging import version

from remoe.errors import ConfigError
from remoe.experts import Experts, naive_experts, resolve_backend, run_experts
from remoe.experts.contract import Problem
from remoe.experts.dispatch import OPERATORS
from remoe.experts.windows import MIN_WINDOW, STORED_MULTIPLE, STORED_WINDOWS, windows
from remoe.routing.assignment import Assignment

EVERYWHERE = ["cpu", "cpu with the other product", "cpu without passes", "cpu without kernels"]
# Triton decides on its first import whether to interpret its kernels, so its tests run in a process of their own, which
# `test_triton_in_its_interpreter` starts. tests/gpu runs the compiled kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RAGGED = ["grouped", "triton"] if INTERPRETED else ["grouped"]
if INTERPRETED:
    from triton import language
    from triton.runtime import interpreter

    make_interpretable = interpreter._patch_lang

    def make_interpretable_once(function):
        """Triton does it at each call of a function in a kernel too, which takes a quarter of all time."""
        used = [value for value in function.__globals__.values() if value is language or value is language.core]
        if any(language.core.is_builtin(module.load) for module in used):
            return make_interpretable(function)
        return None

    interpreter._patch_lang = make_interpretable_once
    # The interpreter is slow; a tile has 16 pairs there, of which "all on" makes two an expert.
    SHAPES = {
        name: (min(T, 20 if density == 1 else 12), D, F, min(E, 20), density)
        for name, (T, D, F, E, density) in SHAPES.items()
    }
SHAPES_16_BIT = {
    "16 bytes": (31, 64, 40, 5, 0.4),
    "odd widths": (31, 61, 35, 5, 0.6),
} | ({} if INTERPRETED else SHAPES | {"long": (9, 1100, 70, 2, 0.7)})


every_backend = pytest.mark.parametrize("backend", EVERYWHERE + RAGGED, indirect=True)


@every_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_naive_in_float64(backend, shape):
    leaves, active = problem(*shape)
    skip_unless_able(backend, leaves[0], leaves[2])
    check_equals_naive(backend, leaves, active, 1e-5)


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


@pytest.mark.parametrize("backend", EVERYWHERE, indirect=True)
def test_gradcheck(backend):
    leaves, active = problem(6, 4, 3, 3, 0.6, torch.float64)
    x, gate_up, down, gate_TE = leaves
    gate_TE = gate_TE.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: backend(*t[:3], Assignment.from_gates(t[3], active)), (x, gate_up, down, gate_TE)
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES_16_BIT.values(), ids=SHAPES_16_BIT.keys())
def test_16_bit(backend, dtype, shape):
    leaves, active = problem(*shape, dtype)
    skip_unless_able(backend, leaves[0], leaves[2])
    check_equals_naive(backend, leaves, active, 1e-2)


@every_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("widths", [(61, 35), (128, 96)], ids=["odd", "even"])
def test_few_tokens_without_gradients(backend, dtype, tolerance, widths):
    """Decoding has kernels of its own; here the experts have 0 to E - 1 tokens each."""
    E = 6 if INTERPRETED else 16
    (x, gate_up, down, gate_TE), _ = problem(E - 1, *widths, E, 1.0, dtype)
    skip_unless_able(backend, x, down)
    active = torch.arange(E - 1)[:, None] < torch.arange(E)
    assignment = Assignment.from_gates(torch.rand_like(gate_TE), active)
    expected = naive_experts(x.double(), gate_up.double(), down.double(), assignment)
    with torch.no_grad():
        y = backend(x, gate_up, down, assignment)
    assert y.dtype == dtype
    assert reference.relative_error(y, expected) < tolerance


@pytest.mark.parametrize("backend", [*EVERYWHERE, "grouped"], indirect=True)  # the interpreter runs in one order only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(backend, dtype):
    leaves, active = problem(*SHAPES["odd"], dtype)
    skip_unless_able(backend, leaves[0], leaves[2])
    check_repeats(backend, leaves, active)


@every_backend
@pytest.mark.parametrize("stored", [8] if INTERPRETED else [10**6, 20])
def test_frozen_experts_get_no_gradients_and_the_rest_is_the_same(backend, stored):
    (x, gate_up, down, gates), active = problem(11 if INTERPRETED else 31, 20, 12, 3, 0.5)
    assignment, dy = Assignment.from_gates(gates.detach(), active), torch.randn_like(x)
    lists = (assignment.gate_N, assignment.token_N, assignment.count_E, assignment.pair_TE)
    ours, pairs = OPERATORS[backend.keywords["backend"]], Problem(x, gate_up, down, *lists)
    _, pre = ours.forward(stored, *pairs)
    trained, frozen = (ours.backward(weights, dy, pre, *pairs) for weights in (True, False))
    assert [gradient.numel() for gradient in frozen[1:3]] == [0, 0]
    assert all(torch.equal(trained[i], frozen[i]) for i in (0, 3))
    for wanted in ([x], [gates], [x, gate_up]):  # of one weight alone: as of both
        leaves = [leaf.detach().requires_grad_(any(leaf is w for w in wanted)) for leaf in (x, gate_up, down, gates)]
        backend(*leaves[:3], Assignment.from_gates(leaves[3], active)).backward(dy)
        assert [leaf.grad is not None for leaf in leaves] == [leaf.requires_grad for leaf in leaves]


@every_backend
def test_one_expert_takes_everything(backend):
    leaves, _ = problem(*SHAPES["all on"])
    active = torch.zeros(len(leaves[0]), 5, dtype=torch.bool)
    active[:, 3] = True
    grads = check_equals_naive(backend, leaves, active, 1e-5)
    assert not grads[1][[0, 1, 2, 4]].any()


LISTS = [
    (density, D, F, stored)
    for density, D, F in [(0.0, 20, 12), (0.5, 20, 12), (1.0, 32, 16), (0.5, 32, 16)]
    for stored in [0, 7, 40, 64, None]
    if not INTERPRETED or stored in (7, None) or (density == 0.5 and stored != 64)
]


@pytest.mark.parametrize("backend", RAGGED, indirect=True)
@pytest.mark.parametrize(("density", "D", "F", "stored"), LISTS)
def test_windows_of_lists_with_room(backend, density, D, F, stored, monkeypatch):
    """Neither the room behind the pairs nor the number of windows or of stored pairs changes a result."""
    monkeypatch.setattr("remoe.experts.windows.MIN_WINDOW", 16)
    monkeypatch.setattr("remoe.experts.windows.MIN_STORED_WINDOW", 1)
    leaves, active = problem(11 if INTERPRETED else 19, D, F, 5, density)
    active[:, 2] = False
    backend.keywords["stored"] = stored
    check_equals_naive(backend, leaves, active, 1e-5, room=True)


@pytest.mark.parametrize("backend", RAGGED, indirect=True)
def test_a_value_that_is_not_finite_stays_with_its_token(backend):
    leaves, active = problem(19, 20, 12, 3, 1.0)
    active[0] = torch.tensor([False, True, False])
    with torch.no_grad():
        leaves[0][0] = torch.nan
        x, gate_up, down, gate_TE = leaves
        y = backend(x, gate_up, down, Assignment.from_gates(gate_TE, active))
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs already")
def test_triton_in_its_interpreter():
    triton = pytest.importorskip("triton")
    old, new = version.parse("3.7"), version.parse("2.4")
    if version.parse(triton.__version__) < old and version.parse(np.__version__) >= new:
        pytest.skip("the interpreter of triton 3.6 fails with numpy 2.4")
    pairs = Path(__file__).parents[1] / "routing" / "test_pairs.py"
    files = [__file__, str(Path(__file__).with_name("test_triton_decode.py")), str(pairs)]
    chosen = "triton or test_pairs"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-k", chosen, *files]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_a_backend_cannot_run_it_says():
    with pytest.raises(ConfigError, match="'triton' cannot run here: no kernels for"):
        resolve_backend("triton", "cpu", torch.float64, 16, 16)
    with pytest.raises(ConfigError, match="'grouped' cannot run here: rows of 6 and 16 numbers"):
        resolve_backend("grouped", "cpu", torch.float32, 6, 16)
    with pytest.raises(ConfigError, match="'sonic' cannot run here: needs CUDA"):
        resolve_backend("sonic", "cpu", torch.bfloat16, 16, 16)


def test_pairs_in_another_form_are_refused():
    active_TE = torch.rand(9, 3) < 0.5
    pairs = Assignment.from_gates(torch.rand(9, 3), active_TE)
    weights = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    for wrong in ({"token_N": pairs.token_N.int()}, {"count_E": pairs.count_E.int()}):
        with pytest.raises(ConfigError, match=r"must be int64, but are .*int32"):
            run_experts(torch.randn(9, 6), *weights, replace(pairs, **wrong))
    with pytest.raises(ConfigError, match=r"on one device, but are on .*'cpu', 'meta'"):
        run_experts(torch.randn(9, 6), *(weight.to("meta") for weight in weights), pairs)


def test_unknown_backend():
    with pytest.raises(ConfigError, match="unknown experts backend 'cuda'"):
        Experts(4, 8, 8, backend="cuda")


def test_the_old_name_of_the_cpu_backend_is_accepted():
    assert Experts(4, 8, 8, backend="loop").backend == "cpu"
    assert resolve_backend("loop", "cpu", torch.float32, 8, 8) == "cpu"
    leaves, active = problem(9, 8, 6, 3, 0.5)
    x, gate_up, down, gate_TE = leaves
    pairs = Assignment.from_gates(gate_TE, active)
    assert torch.equal(*(run_experts(x, gate_up, down, pairs, name) for name in ("loop", "cpu")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_of_another_dtype_are_converted(dtype):
    leaves, active = problem(63, 60, 36, 5, 0.5)
    x, gate_up, down, gate_TE = (leaf.detach() for leaf in leaves)
    pairs = Assignment.from_gates(gate_TE.to(dtype), active)
    same = Assignment.from_gates(gate_TE.to(dtype).float(), active)
    y, expected = (run_experts(x, gate_up, down, p, backend="cpu") for p in (pairs, same))
    assert torch.equal(y, expected)


def test_another_number_of_threads_in_the_backward_pass():
    leaves, active = problem(400, 64, 48, 6, 1.0)
    x, gate_up, down, gate_TE = leaves
    dy, threads = torch.randn_like(x), torch.get_num_threads()
    found = []
    for forward, back in ((1, 1), (1, 2)):
        torch.set_num_threads(forward)
        y = run_experts(x, gate_up, down, Assignment.from_gates(gate_TE, active), backend="cpu", stored=700)
        torch.set_num_threads(back)
        found.append(torch.autograd.grad(y, leaves, dy))
    torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert ((one - other).norm() / one.norm()) < 1e-6


@pytest.mark.parametrize(("D", "F"), [(256, 704), (2048, 704), (2048, 256), (4096, 256)])
@pytest.mark.parametrize(
    ("tokens", "E", "k"), [(4096, 8, 1), (12288, 8, 1), (16384, 8, 1), (4097, 32, 4), (16384, 64, 8)]
)
def test_a_window_ends_with_the_stored_pairs_and_its_scratch_memory_is_no_larger(tokens, E, k, D, F):
    stored = math.ceil(1.25 * k * tokens / STORED_MULTIPLE) * STORED_MULTIPLE
    slices = windows(tokens * E, stored, tokens, D, F)
    assert [w.stop for w in slices[:-1]] == [w.start for w in slices[1:]]
    assert slices[0].start == 0
    assert slices[-1].stop == tokens * E
    assert stored in [w.stop for w in slices]
    assert len({len(w) for w in slices[:-1]}) == 1
    rows = len(slices[0])
    shortest = rows < 2 * MIN_WINDOW or STORED_WINDOWS * rows == stored
    assert rows * (2 * F + max(D, F)) <= stored * 2 * F or shortest
    assert rows >= min(stored, MIN_WINDOW)


def test_few_pairs_make_no_more_windows():
    assert len(windows(512 * 64, 640, 512, 256, 256)) == 2
    assert len(windows(512 * 8, 0, 512, 256, 256)) == 1
