"""Routers against the formulas in plain float64 loops: gates, counts, regulariser and every gradient."""

from typing import Literal

import pytest
import reference
import torch

from remoe.errors import ConfigError
from remoe.routing import ROUTERS, ReLURouter, TopKRouter, build_router

T, D, E = 63, 60, 5


def router_and_input(cls, k=2, **options):
    router = cls(D, E, k, **options)
    torch.nn.init.normal_(router.weight)
    return router, torch.randn(T, D, requires_grad=True)


def check(router, x, gate_ref, regularizer_ref, weight64, x64):
    routing = router(x)
    probe = torch.randn(T, E)
    ((routing.gate_TE * probe).sum() + routing.regularizer).backward()
    ((gate_ref * probe.double()).sum() + regularizer_ref).backward()
    assert reference.relative_error(routing.gate_TE, gate_ref) < 1e-5
    assert reference.relative_error(routing.regularizer, regularizer_ref) < 1e-5
    assert reference.relative_error(x.grad, x64.grad) < 1e-5
    assert reference.relative_error(router.weight.grad, weight64.grad) < 1e-5
    assert routing.count_E.tolist() == (gate_ref > 0).sum(dim=0).tolist()
    return routing


def double(tensor):
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("load_balance", [True, False], ids=["balanced", "plain"])
def test_relu_equals_the_formulas(load_balance):
    router, x = router_and_input(ReLURouter, load_balance=load_balance)
    x64, weight64 = double(x), double(router.weight)
    gate = reference.relu_gates(x64, weight64)
    penalty = reference.balanced_l1(gate, k=2) if load_balance else reference.l1(gate)
    routing = check(router, x, gate, penalty, weight64, x64)
    assert routing.sparsity.item() == pytest.approx(1 - (gate > 0).double().mean().item(), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_equals_the_formulas(k):
    router, x = router_and_input(TopKRouter, k=k)
    x64, weight64 = double(x), double(router.weight)
    gate = reference.topk_gates(x64, weight64, k)
    prob = reference.topk_gates(x64, weight64, E)
    routing = check(router, x, gate, reference.switch(prob, gate, k), weight64, x64)
    assert routing.count_E.sum().item() == T * k


def test_pairs_are_sorted_and_carry_their_gates():
    router, x = router_and_input(ReLURouter)
    routing = router(x)
    pairs = routing.assignment
    order = pairs.expert_N * T + pairs.token_N
    assert (order[1:] > order[:-1]).all()
    assert torch.equal(pairs.gate_N, routing.gate_TE[pairs.token_N, pairs.expert_N])
    assert (pairs.gate_N > 0).all()
    assert len(pairs.gate_N) == (routing.gate_TE > 0).sum()


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("topk", {}, 2),
        ("topk", {"warmup_k": 4, "warmup_steps": 1}, 4),
        ("sigmoid", {}, 2),
        ("sparsemixer", {}, 2),
        ("hash", {}, 2),
        ("relu", {"max_experts_per_token": 3}, 3),
        ("relu", {}, E),
    ],
)
def test_lists_with_room_have_no_more_than_there_can_be(name, options, most, monkeypatch):
    """As on CUDA: the room costs memory, and there windows of work."""
    router = build_router(name, D, E, 2, **options)
    router.reset_parameters(std=1.0)
    router.eval()
    x, ids = torch.randn(T, D), torch.randint(100, (T,))
    exact = router(x, ids_T=ids).assignment
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    roomy = router(x, ids_T=ids).assignment
    pairs = len(exact.token_N)
    assert len(roomy.token_N) == T * most >= pairs
    assert torch.equal(roomy.token_N[:pairs], exact.token_N)
    assert torch.equal(roomy.expert_N[:pairs], exact.expert_N)
    assert torch.equal(roomy.gate_N[:pairs], exact.gate_N)
    assert (roomy.expert_N[pairs:] == E).all()


@pytest.mark.parametrize("name", list(ROUTERS))
def test_padding_is_in_no_pair_no_count_and_no_loss(name):
    router = build_router(name, D, E, 1 if name == "lory" else 2)
    router.reset_parameters(std=1.0)
    x, ids = torch.randn(T, D), torch.randint(100, (T,))
    mask = torch.rand(T) > 0.3
    if name == "sparsemixer":
        router.eval()  # its draws in training differ
    with_padding, without = router(x, mask, ids_T=ids), router(x[mask], ids_T=ids[mask])
    assert torch.equal(with_padding.count_E, without.count_E)
    assert with_padding.num_tokens == mask.sum()
    torch.testing.assert_close(with_padding.gate_TE[mask], without.gate_TE)
    assert not with_padding.gate_TE[~mask].any()
    torch.testing.assert_close(with_padding.regularizer, without.regularizer)
    torch.testing.assert_close(with_padding.sparsity, without.sparsity)
    assert mask[with_padding.assignment.token_N].all()
    nothing = router(x, torch.zeros(T, dtype=torch.bool), ids_T=ids)
    assert nothing.regularizer == 0
    assert nothing.count_E.sum() == 0


@pytest.mark.parametrize("cap", [2, 3, 4, 5, 9])
def test_cap_keeps_the_largest_gates_and_the_penalty(cap):
    router, x = router_and_input(ReLURouter, max_experts_per_token=cap)
    free = ReLURouter(D, E, 2)
    free.load_state_dict(router.state_dict())
    routing, uncapped = router(x), free(x)
    per_token = (routing.gate_TE > 0).sum(dim=1)
    assert per_token.max() <= cap
    assert torch.equal(per_token, (uncapped.gate_TE > 0).sum(dim=1).clamp(max=cap))
    for kept, all_gates in zip(routing.gate_TE, uncapped.gate_TE, strict=True):
        count = int((kept > 0).sum())
        assert torch.equal(kept.sort().values[E - count :], all_gates.sort().values[E - count :])
    assert routing.regularizer == uncapped.regularizer


@pytest.mark.parametrize("name", ["relu", "topk"])
@pytest.mark.parametrize("mode", ["bfloat16 input", "autocast"])
def test_logits_and_gates_are_float32(name, mode):
    router = build_router(name, D, E, 2)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(T, D).bfloat16()
    exact = x.float() @ router.weight.t()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        routing = router(x if mode == "bfloat16 input" else x.float())
    assert routing.logits_TE.dtype == routing.gate_TE.dtype == routing.assignment.gate_N.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TE, exact)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_logits_of_16_bit_tokens_have_the_gradients_of_float32_and_keep_no_copy(weights):
    router = build_router("relu", D, E, 2, bias=True).to(weights)
    router.reset_parameters(std=1.0)
    x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        logits = router.logits(x)
    assert torch.float32 not in kept or weights == torch.float32
    probe = torch.randn(T, E)
    found = torch.autograd.grad((logits * probe).sum(), (x, router.weight, router.bias))
    exact = probe @ router.weight.float(), probe.t() @ x.float(), probe.sum(dim=0)
    for gradient, expected, dtype in zip(found, exact, (torch.bfloat16, weights, weights), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-5)


def test_relu_gradcheck():
    # Away from zero logits, where ReLU has no derivative.
    router = ReLURouter(4, 3, 1).double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert (router(x).logits_TE.abs() > 1e-3).all()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(router, {"weight": w}, x).gate_TE, (x, router.weight)
    )


def test_plain_l1_adds_up_over_micro_batches_and_the_balanced_one_names_its_difference():
    x = torch.randn(64, D)
    for load_balance in (False, True):
        router = ReLURouter(D, E, 2, load_balance=load_balance)
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
        whole = router(x)
        parts = [router(part) for part in x.split(16)]
        mean = torch.stack([part.regularizer for part in parts]).mean()
        if load_balance:
            # f is taken per micro-batch: the difference is the covariance of load and gates over micro-batches.
            load = torch.stack([part.count_E / 16 for part in parts]).double()
            gates = torch.stack([part.gate_TE.mean(dim=0) for part in parts]).double()
            covariance = ((load - load.mean(0)) * (gates - gates.mean(0))).mean(0)
            assert (mean - whole.regularizer).item() == pytest.approx((E / 2 * covariance.sum()).item(), rel=1e-3)
            assert covariance.sum() != 0
        else:
            torch.testing.assert_close(mean, whole.regularizer)


@pytest.mark.parametrize(
    ("name", "k", "options", "words"),
    [
        ("relux", 1, {}, "unknown router 'relux'"),
        ("relu", 6, {}, "k = 6 and E = 5"),
        ("topk", 0, {}, "k must be at least 1, but is 0"),
        ("relu", 2, {"max_experts_per_token": 1}, "at least k = 2"),
        ("topk", 1, {"max_experts_per_token": 2}, "max_experts_per_token"),
        ("relu", 1, {"bias": 1}, "option bias must be true or false, but is 1"),
        ("relu", 1, {"max_experts_per_token": True}, "must be a whole number, but is True"),
        ("relu", 1, {"k": 2}, "has no option 'k'"),
        ("relu", 1, {"load_balance_power": float("nan")}, "must be finite, but is nan"),
        ("relu_scaled", 1, {"gate_scale": "2"}, "option gate_scale must be a number"),
        ("relu_norm", 1, {"penalty": 3}, "option penalty must be a word"),
        ("relu_norm", 1, {"eps": 0.0}, "eps > 0"),
        ("relu_norm", 1, {"locality": -1}, "locality >= 0"),
        ("threshold", 1, {"decay": -0.1}, "decay must be at least 0"),
        ("expert_choice", 1, {"decay": 1}, "below 1, but is 1"),
        ("sigmoid", 1, {"renormalize": 0}, "option renormalize must be true or false"),
        ("hash", 1, {"seed": 1}, "router 'hash' has no option 'seed'; it has none"),
    ],
)
def test_bad_settings_are_named(name, k, options, words):
    with pytest.raises(ConfigError, match=words):
        build_router(name, D, E, k, **options)


def test_options_of_an_own_router_are_checked_where_their_types_are_known(monkeypatch):
    class Own(ReLURouter):
        def __init__(self, d_model, num_experts, k, *, size: "int" = 1, kind: Literal["a", "b"] = "a", **options):
            super().__init__(d_model, num_experts, k, **options)
            self.kind = kind

    monkeypatch.setitem(ROUTERS, "own", Own)
    assert build_router("own", D, E, 1, size=2, kind="b", gate_scale=2).kind == "b"
    with pytest.raises(ConfigError, match="option size must be a whole number, but is 'a'"):
        build_router("own", D, E, 1, size="a")


@pytest.mark.parametrize("router", ["relu", "lory"])
def test_a_routing_is_a_tree_of_its_tensors(router):
    from torch.utils._pytree import tree_flatten, tree_unflatten

    routing = build_router(router, 6, 4, 1)(torch.randn(10, 6), seq_len=5)
    leaves, spec = tree_flatten((routing,))
    assert any(leaf is routing.gate_TE for leaf in leaves)
    assert any(leaf is routing.assignment.gate_N for leaf in leaves)
    (again,) = tree_unflatten(leaves, spec)
    assert type(again) is type(routing)
    assert again.assignment.token_N is routing.assignment.token_N
