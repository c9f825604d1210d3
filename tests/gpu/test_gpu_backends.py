"""The contracts of tests/experts on a GPU, and those that only a GPU can break: waiting for it, and its memory."""

import functools
import math

import pytest
import torch
from experts.cases import SHAPES, check_equals_naive, check_repeats, no_waiting, problem

import remoe
from remoe.errors import ConfigError
from remoe.experts import Experts, resolve_backend, run_experts
from remoe.routing.assignment import Assignment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

LARGE = {
    "many tiles": (1000, 256, 384, 8, 0.3),
    "odd and large": (777, 260, 196, 6, 0.5),
    "ragged": (2048, 512, 704, 16, 0.1),
}
every_backend = pytest.mark.parametrize("name", ["triton", "grouped", "cpu", "sonic"])
with_windows = pytest.mark.parametrize("name", ["triton", "grouped"])


def backend(name, leaves, **options):
    x, _, down, _ = leaves
    try:
        resolve_backend(name, "cuda", x.dtype, *down.shape[1:])
    except ConfigError as error:
        if name in ("triton", "cpu"):  # these are ours and must run wherever there is CUDA
            raise
        pytest.skip(str(error))
    return functools.partial(run_experts, backend=name, **options)


@every_backend
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE.values()], ids=[*SHAPES, *LARGE])
def test_float32_equals_naive_in_float64(name, shape):
    leaves, active = problem(*shape, device="cuda")
    check_equals_naive(backend(name, leaves), leaves, active, 1e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE.values()], ids=[*SHAPES, *LARGE])
def test_16_bit_equals_naive_in_float64(name, dtype, shape):
    leaves, active = problem(*shape, dtype, device="cuda")
    check_equals_naive(backend(name, leaves), leaves, active, 1e-2)


@with_windows
@pytest.mark.parametrize("stored", [0, 7, 300, 1500, None], ids=lambda stored: f"stored={stored}")
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("dtype", "D", "F"), [(torch.bfloat16, 192, 96), (torch.bfloat16, 136, 72), (torch.float16, 192, 96)]
)
def test_windows(name, dtype, D, F, density, stored, monkeypatch):
    monkeypatch.setattr("remoe.experts.windows.MIN_WINDOW", 256)
    monkeypatch.setattr("remoe.experts.windows.MIN_STORED_WINDOW", 1)
    leaves, active = problem(333, D, F, 6, density, dtype, device="cuda")
    active[:, 2] = False
    check_equals_naive(backend(name, leaves, stored=stored), leaves, active, 1e-2)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_expert_takes_everything(name, dtype):
    leaves, active = problem(1000, 256, 384, 8, 0.0, dtype, device="cuda")
    active[:, 3] = True
    grads = check_equals_naive(backend(name, leaves), leaves, active, 1e-5 if dtype == torch.float32 else 1e-2)
    assert not grads[1][[0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE.values()], ids=[*SHAPES, *LARGE])
def test_triton_programs_with_several_tiles(shape, monkeypatch):
    """What a full machine does: a program goes on to its next tile while others still write theirs."""
    from remoe.experts.triton import backend as triton_backend

    tiles = triton_backend.device_tiles
    monkeypatch.setattr(triton_backend, "device_tiles", lambda *given: (tiles(*given)[0], 3))
    leaves, active = problem(*shape, torch.bfloat16, device="cuda")
    check_equals_naive(backend("triton", leaves), leaves, active, 1e-2)


@pytest.mark.parametrize(
    "shape",
    [(4096, 2048, 1408, 8, 0.25), (4096, 1088, 704, 16, 0.1), (900, 256, 128, 256, 0.02)],
    ids=["real", "narrow last tile", "E=256"],
)
def test_triton_at_real_sizes(shape):
    leaves, active = problem(*shape, torch.bfloat16, device="cuda")
    check_equals_naive(backend("triton", leaves), leaves, active, 1e-2)


@pytest.mark.parametrize("T", [0, 1, 5, 32, 33])
def test_triton_with_few_tokens(T):
    leaves, active = problem(T, 768, 328, 16, 0.2, torch.bfloat16, device="cuda")
    if T == 0:
        x, gate_up, down, gate_TE = leaves
        y = backend("triton", leaves)(x, gate_up, down, Assignment.from_gates(gate_TE, active))
        y.sum().backward()
        assert y.shape == (0, 768)
        assert not gate_up.grad.any()
    else:
        check_equals_naive(backend("triton", leaves), leaves, active, 1e-2)


def test_triton_with_rows_that_begin_anywhere():
    leaves, active = problem(64, 61, 35, 5, 0.4, torch.bfloat16, device="cuda")
    leaves = (torch.randn(65, 61, dtype=torch.bfloat16, device="cuda")[1:].requires_grad_(), *leaves[1:])
    assert leaves[0].data_ptr() % 16
    x, gate_up, down, gate_TE = leaves
    assignment = Assignment.from_gates(gate_TE, active)
    y = backend("triton", leaves)(x, gate_up, down, assignment)
    expected = run_experts(*(leaf.double() for leaf in leaves[:3]), assignment, backend="naive")
    assert (y - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("router", ["relu", "topk"])
def test_layer_compiles_in_one_graph_and_under_autocast(router, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = remoe.MoE(256, 384, 8, 2, router, backend="triton").to("cuda", dtype)
    compiled = torch.compile(layer, fullgraph=True)
    for T in (64, 200):
        found = []
        for run in (layer, compiled):
            generator = torch.Generator("cuda").manual_seed(T)
            x = torch.randn(T, 256, device="cuda", dtype=dtype, generator=generator).requires_grad_()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                y, routing = run(x)
            layer.zero_grad()
            (y.float().square().mean() + routing.regularizer).backward()
            found.append((y, x.grad, layer.experts.down_proj.grad.clone(), layer.router.weight.grad.clone()))
        for one, other in zip(*found, strict=True):
            assert (one - other).float().norm() <= 2e-2 * one.float().norm()


@with_windows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_runs_are_bitwise_equal(name, dtype):
    leaves, active = problem(*LARGE["ragged"], dtype, device="cuda")
    check_repeats(backend(name, leaves, stored=1500), leaves, active)


def test_triton_never_waits_for_the_device():
    # In float32 the same launches are made; "grouped" waits.
    leaves, active = problem(*LARGE["ragged"], torch.bfloat16, device="cuda")
    x, gate_up, down, gate_TE = leaves
    experts = backend("triton", leaves, stored=1500)
    dy = torch.randn_like(x)
    experts(x, gate_up, down, Assignment.from_gates(gate_TE, active)).backward(dy)  # compiles
    with no_waiting():
        experts(x, gate_up, down, Assignment.from_gates(gate_TE, active)).backward(dy)


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_layer_never_waits_for_the_device(router):
    layer = remoe.MoE(256, 384, 8, 1, router, backend="triton").to("cuda", torch.bfloat16)
    x = torch.randn(4, 256, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    def step():
        y, routing = layer(x)
        (y.float().square().mean() + routing.regularizer).backward()

    step()  # compiles
    with no_waiting():
        step()


@pytest.mark.parametrize(
    ("T", "E", "density"), [(16384, 64, 0.13), (1000, 200, 0.5), (77, 5, 1.0), (64, 8, 0.0), (0, 8, 0.5)]
)
def test_listed_pairs_are_those_that_the_host_lists(T, E, density):
    active_TE = torch.rand(T, E, device="cuda") < density
    gate_TE = torch.rand(T, E, device="cuda", requires_grad=True)
    found = Assignment.from_gates(gate_TE, active_TE)
    expected = Assignment.from_gates(gate_TE.cpu(), active_TE.cpu())
    R = expected.token_N.shape[0]
    for name, behind in (("token_N", 0), ("expert_N", E), ("gate_N", 0)):
        assert torch.equal(getattr(found, name)[:R].cpu(), getattr(expected, name))
        assert (getattr(found, name)[R:] == behind).all()
    assert torch.equal(found.count_E.cpu(), expected.count_E)
    place_TE = torch.full((T, E), -1, dtype=torch.int32)
    place_TE[expected.token_N, expected.expert_N] = torch.arange(R, dtype=torch.int32)
    assert torch.equal(found.pair_TE.cpu(), place_TE)
    dgate_N = torch.randn_like(found.gate_N)
    (dgate_TE,) = torch.autograd.grad(found.gate_N, gate_TE, dgate_N)
    (expected_TE,) = torch.autograd.grad(expected.gate_N, gate_TE, dgate_N[:R].cpu())
    assert torch.equal(dgate_TE, expected_TE)


@pytest.mark.parametrize("E", [8, 13])
def test_logits_of_bfloat16_tokens_are_as_exact_as_in_float32(E):
    router = remoe.MoE(512, 64, E, 2, "relu").router.to("cuda", torch.bfloat16)
    x = torch.randn(700, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dlogits = torch.randn(700, E, device="cuda")
    router.logits(x).backward(dlogits)
    exact = [t.detach().double().requires_grad_() for t in (x, router.weight)]
    logits = exact[0] @ exact[1].t()
    logits.backward(dlogits.double())
    assert (router.logits(x) - logits).norm() < 1e-6 * logits.norm()
    for ours, theirs in zip((x, router.weight), exact, strict=True):  # rounded to bfloat16, and no worse
        rounding = (theirs.grad.bfloat16() - theirs.grad).norm()
        assert (ours.grad - theirs.grad).norm() < 1.02 * rounding


def test_triton_in_a_cuda_graph():
    leaves, active = problem(*LARGE["many tiles"], torch.bfloat16, device="cuda")
    x, gate_up, down, gate_TE = (leaf.detach() for leaf in leaves)
    experts = backend("triton", leaves)
    expected = experts(x, gate_up, down, Assignment.from_gates(gate_TE, active))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(x, gate_up, down, Assignment.from_gates(gate_TE, active))
    graph.replay()
    assert torch.equal(y, expected)


def test_windows_without_pairs_change_nothing_when_the_host_leaves_them_out(monkeypatch):
    from remoe.experts.triton.backend import Launcher

    T, E, stored = 4096, 16, 4104
    leaves, active = problem(T, 256, 128, E, 0.05, torch.bfloat16, device="cuda")
    x, gate_up, down, gate_TE = leaves
    experts, launches = backend("triton", leaves, stored=stored), []
    combine = Launcher.combine
    monkeypatch.setattr(Launcher, "combine", lambda *given: launches.append(given) or combine(*given))

    def run(ahead):
        assignment = Assignment.from_gates(gate_TE, active)
        launches.clear()
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(2_000_000_000)  # about a second: the host is done before the device begins
        y = experts(x, gate_up, down, assignment)
        if not ahead:
            torch.cuda.synchronize()
        return len(launches), y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    run(ahead=False)  # compiles
    every, *first = run(ahead=True)
    fewer, *second = run(ahead=False)
    assert every == -(-T * E // stored)
    assert fewer < every
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_dense_stage_needs_at_most_half_more_memory():
    T, D, F, E, k = 8192, 512, 256, 32, 4
    layer = Experts(E, D, F, "triton", k=k).to("cuda", torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=1 / math.sqrt(D))
    x = torch.randn(T, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    peaks = []
    for density in (k / E, k / E, 1.0):  # the first compiles
        active = torch.rand(T, E, device="cuda") < density
        gates = torch.rand(T, E, device="cuda").mul(active).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        layer(x, Assignment.from_gates(gates, active)).float().square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.5 * peaks[1]
