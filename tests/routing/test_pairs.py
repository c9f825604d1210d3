"""The operators that list the routed pairs: plain, as kernels in Triton's interpreter, and compiled for GPUs."""

import os

import pytest
import torch

from remoe.routing.assignment import Assignment
from remoe.routing.pairs import _gate_gradient, _list_pairs, list_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """In the interpreter the kernels run on a CPU; without it operators of torch do."""
    monkeypatch.setattr("remoe.routing.pairs._kernels_run_on", lambda device: INTERPRETED)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("T", "E"), [(1, 1), (63, 5), (300, 8), (40, 129), (0, 4)])
def test_lists_and_gradient_are_those_of_the_eager_way(T, E, density):
    active_TE = torch.rand(T, E) < density
    gate_TE = torch.rand(T, E).requires_grad_()
    eager = Assignment.from_gates(gate_TE, active_TE)
    R, room = eager.token_N.shape[0], 9
    token_N, expert_N, gate_N, count_E, pair_TE = list_pairs(gate_TE, active_TE, R + room)
    assert torch.equal(token_N, torch.cat((eager.token_N, torch.zeros(room, dtype=torch.int64))))
    assert torch.equal(expert_N, torch.cat((eager.expert_N, torch.full((room,), E))))
    assert torch.equal(gate_N, torch.cat((eager.gate_N, torch.zeros(room))))
    assert torch.equal(count_E, eager.count_E)
    places_TE = torch.full((T, E), -1, dtype=torch.int32)
    places_TE[eager.token_N, eager.expert_N] = torch.arange(R, dtype=torch.int32)
    assert torch.equal(pair_TE, places_TE)
    dgate_N = torch.randn(R + room)
    expected = torch.autograd.grad(eager.gate_N, gate_TE, dgate_N[:R])[0]
    assert torch.equal(torch.autograd.grad(gate_N, gate_TE, dgate_N)[0], expected)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_no_more_is_written_than_there_is_room_for():
    token_N, *_ = list_pairs(torch.rand(40, 4), torch.ones(40, 4, dtype=torch.bool), 50)
    assert torch.equal(token_N, torch.cat((torch.arange(40), torch.arange(10))))


@pytest.mark.skipif(INTERPRETED, reason="runs without kernels")
@pytest.mark.parametrize("size", [20, 48])
def test_operators_follow_their_contract(size):
    active_TE = torch.rand(12, 4) < 0.3
    active_TE[3:] &= size == 48
    torch.library.opcheck(_list_pairs, (torch.rand(12, 4), active_TE, size))
    torch.library.opcheck(_gate_gradient, (torch.rand(size), torch.full((12, 4), -1, dtype=torch.int32)))


@pytest.mark.skipif(INTERPRETED, reason="the kernels are interpreted here")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from remoe.routing import pair_kernels

    types = {"active": "*i1", "gate": "*fp32", "listed": "*fp32", "dlisted": "*fp32", "dgate": "*fp32"}
    types |= {"token": "*i64", "expert": "*i64", "total": "*i64", "count": "*i32", "start": "*i32", "pair": "*i32"}
    sizes = {"EXPERTS": 64, "BLOCK": 128, "CHUNK": 4096, "FILL": 1024}
    for name in ("count_block", "sum_before", "list_pairs", "gate_gradient"):
        kernel = getattr(pair_kernels, name)
        constants = {p.name: sizes[p.name] for p in kernel.params if p.is_constexpr}
        signature = {p.name: types.get(p.name.removesuffix("_ptr"), "i32") for p in kernel.params}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, {})
        assert "cubin" in compile(source, target=GPUTarget("cuda", capability, 32)).asm
