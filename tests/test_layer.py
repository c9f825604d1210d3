"""The layer against the paper's formulas in float64 loops: output, penalty and every gradient."""

import itertools

import pytest
import reference
import torch

import remoe
from remoe.errors import ConfigError
from remoe.routing import ROUTERS

T, D, F, E = 63, 60, 36, 5


def pair(router, k=2, backend="cpu", shape=(T, D), **options):
    layer = remoe.MoE(D, F, E, k, router, backend=backend, init_std=0.3, **options)
    return layer, torch.randn(shape, requires_grad=True)


def expected(layer, x, router, k):
    """Output, penalty and gradients by the reference, in float64, for the loss sum(y * probe) + penalty."""
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x64 = x.detach().double().reshape(-1, D).requires_grad_()
    gate_up, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    if router == "relu":
        gate = reference.relu_gates(x64, weights["router.weight"])
        penalty = reference.balanced_l1(gate, k)
    elif router == "topk":
        gate = reference.topk_gates(x64, weights["router.weight"], k)
        penalty = reference.switch(reference.topk_gates(x64, weights["router.weight"], E), gate, k)
    else:
        gate, penalty = torch.ones(len(x64), 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return reference.layer(x64, gate, gate_up, down), penalty, weights, x64


@pytest.mark.parametrize("backend", ["cpu", "naive"])
@pytest.mark.parametrize("router", ["relu", "topk", "dense", "dense_wide"])
def test_equals_the_formulas(router, backend):
    layer, x = pair(router, backend=backend)
    y64, penalty64, weights, x64 = expected(layer, x, router, 2)
    probe = torch.randn(T, D)
    y, routing = layer(x)
    ((y * probe).sum() + routing.regularizer).backward()
    ((y64 * probe.double()).sum() + penalty64).backward()
    assert reference.relative_error(y, y64) < 1e-5
    assert reference.relative_error(routing.regularizer, penalty64) < 1e-5
    assert reference.relative_error(x.grad, x64.grad) < 1e-5
    for name, parameter in layer.named_parameters():
        assert reference.relative_error(parameter.grad, weights[name].grad) < 1e-5, name


@pytest.mark.parametrize("shape", [(1, D), (7, 9, D), (2, 3, 4, D), (D,)], ids=str)
def test_any_leading_dimensions(shape):
    layer, x = pair("relu", shape=shape)
    y, routing = layer(x)
    assert y.shape == x.shape
    flat, _ = layer(x.reshape(-1, D))
    torch.testing.assert_close(y.reshape(-1, D), flat)
    assert routing.num_tokens == x.numel() // D


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_one_expert(router):
    layer = remoe.MoE(D, F, 1, 1, router, init_std=0.3)
    x = torch.randn(T, D)
    y, routing = layer(x)
    assert routing.gate_TE.shape == (T, 1)
    if router == "topk":
        assert routing.sparsity == 0
        torch.testing.assert_close(y, layer.experts(x))


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_all_off_gives_zero_and_not_missing_gradients(backend):
    layer, x = pair("relu", backend=backend)
    with torch.no_grad():
        x.abs_()
        layer.router.weight.copy_(-layer.router.weight.abs())
    y, routing = layer(x)
    assert routing.count_E.sum() == 0
    assert routing.sparsity == 1
    assert not y.any()
    (y.sum() + routing.regularizer).backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert tensor.grad is not None, name
        assert not tensor.grad.any(), name


def test_all_on():
    layer, x = pair("relu")
    with torch.no_grad():
        x.abs_()
        layer.router.weight.abs_()
    y, routing = layer(x)
    assert routing.count_E.tolist() == [T] * E
    assert routing.sparsity == 0
    y64, *_ = expected(layer, x, "relu", 2)
    assert reference.relative_error(y, y64) < 1e-5


def test_a_token_without_an_expert_is_zero_and_the_others_do_not_notice():
    layer, x = pair("relu")
    with torch.no_grad():
        layer.router.weight[:, 0] = 0
        layer.router.weight[:, 0] -= 1
        x[5] = 0
        x[5, 0] = 1
    y, routing = layer(x)
    assert not routing.gate_TE[5].any()
    assert not y[5].any()
    y.sum().backward()
    assert not x.grad[5].any()
    others = torch.arange(T) != 5
    torch.testing.assert_close(y[others], layer(x[others])[0])


def test_granularity_splits_experts_and_keeps_the_compute():
    layer = remoe.MoE(D, F, E, 2, "topk", granularity=3)
    assert layer.experts.down_proj.shape == (15, D, 12)
    _, routing = layer(torch.randn(T, D))
    assert routing.count_E.sum() == T * 6
    assert sum(p.numel() for p in layer.experts.parameters()) == sum(
        p.numel() for p in remoe.MoE(D, F, E, 2).experts.parameters()
    )


def test_dense_has_the_width_of_k_experts():
    assert remoe.MoE(D, F, E, 2, "dense").experts.down_proj.shape == (1, D, 2 * F)
    assert remoe.MoE(D, F, E, 2, "dense_wide").experts.down_proj.shape == (1, D, E * F)


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
def test_padding_changes_nothing_for_the_others(router):
    layer, x = pair(router, shape=(3, 21, D))
    mask = torch.rand(3, 21) > 0.3
    y, routing = layer(x, mask)
    alone, routing_alone = layer(x[mask])
    torch.testing.assert_close(y[mask], alone)
    assert not y[~mask].any()
    torch.testing.assert_close(routing.regularizer, routing_alone.regularizer)


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
def test_autocast_and_its_gradients(router):
    layer, x = pair(router)
    exact, _ = layer(x)
    probe = torch.randn(T, D)
    exact_grads = torch.autograd.grad((exact * probe).sum(), [x, *layer.parameters()], allow_unused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.gate_TE.dtype == torch.float32
    grads = torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()], allow_unused=True)
    assert reference.relative_error(y, exact) < 1e-2
    for grad, other in zip(grads, exact_grads, strict=True):
        assert reference.relative_error(grad, other) < 2e-2  # two bfloat16 GEMMs one behind the other


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((D, F, 5, 6), {}, "k = 6 is more than the number of experts, 5"),
        ((D, F, 5, 0), {}, "k must be at least 1"),
        ((0, F, 5, 1), {}, "d_model must be at least 1"),
        ((D, F, 5, 1.5), {}, "k must be a whole number, but is 1.5"),
        ((D, F, 5, True), {}, "k must be a whole number, but is True"),
        ((D, F, 5.0, 1), {}, "num_experts must be a whole number, but is 5.0"),
        ((D, float("nan"), 5, 1), {}, "d_ffn must be a whole number, but is nan"),
        ((D, F, 5, 1), {"granularity": 1.5}, "granularity must be a whole number"),
        ((D, F, 5, 1), {"granularity": 0}, "granularity must be at least 1, but is 0"),
        ((D, F, 5, 1), {"shared_expert_size": 2.5}, "shared_expert_size must be a whole number"),
        ((D, F, 5, 1), {"init_std": float("nan")}, "init_std must be a finite number of at least 0, but is nan"),
        ((D, F, 5, 1), {"router": "soft"}, "unknown router 'soft'"),
        ((D, F, 5, 1), {"granularity": 5}, "granularity must divide d_ffn = 36"),
        ((D, F, 5, 1), {"backend": "fast"}, "unknown experts backend 'fast'"),
    ],
)
def test_bad_settings_are_named(arguments, options, words):
    with pytest.raises(ConfigError, match=words):
        remoe.MoE(*arguments, **options)


@pytest.mark.parametrize(("threshold", "cap"), [(0.3, None), (0.0, 1), (0.2, 2)])
def test_weak_pairs_are_left_out_at_evaluation_only(threshold, cap):
    D = 6
    layer = remoe.MoE(D, 8, 5, 2)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(9, D)
    routing = layer.eval()(x)[1]
    layer.gate_threshold, layer.max_experts = threshold, cap
    y, pruned = layer(x)
    expected = torch.zeros_like(y)
    pairs = 0
    for t in range(len(x)):
        row = routing.gate_TE[t].tolist()
        kept = sorted((e for e in range(5) if row[e] > threshold), key=lambda e: -row[e])[:cap]
        pairs += len(kept)
        for e in kept:
            gate, up = (layer.experts.gate_up_proj[e] @ x[t]).chunk(2)
            expected[t] += row[e] * (layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(y, expected)
    assert pruned.count_E.sum() == pairs < routing.count_E.sum()
    assert torch.equal(layer.train()(x)[1].gate_TE, routing.gate_TE)


def test_an_attention_mask_of_integers_is_a_mask():
    layer = remoe.MoE(6, 8, 4, 1)
    x, mask = torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 0, 0]])
    (y, routing), (expected, same) = layer(x, mask), layer(x, mask.bool())
    assert torch.equal(y, expected)
    assert routing.num_tokens == same.num_tokens == 3


@pytest.mark.parametrize(
    ("x", "others", "words"),
    [
        ((2, 3, 5), {}, r"x must be \(..., 6\), but is \(2, 3, 5\)"),
        ((2, 3, 6), {"mask": (2, 4)}, r"mask must be \(2, 3\) for this x, but is \(2, 4\)"),
        ((2, 3, 6), {"token_ids": (6,)}, r"token_ids must be \(2, 3\)"),
    ],
)
def test_inputs_of_a_wrong_shape_are_named(x, others, words):
    given = {name: torch.ones(shape, dtype=torch.int64) for name, shape in others.items()}
    with pytest.raises(ConfigError, match=words):
        remoe.MoE(6, 8, 4, 1)(torch.randn(x), **given)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [*itertools.product(("training", "evaluation", "pruned"), ("cpu", "naive", "grouped")), ("compiled", "cpu")],
)
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "lory"])
def test_nan_stays_visible_in_its_token_alone(router, backend, mode):
    layer = remoe.MoE(16, 32, 4, 2, router, backend=backend, init_std=0.3).train(mode in ("training", "compiled"))
    if mode == "pruned":
        layer.gate_threshold, layer.max_experts = 1e-3, 3
    x, ids = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.int64)
    x[0, 2, 3] = float("nan")
    mask = torch.ones(2, 6, dtype=torch.bool)
    run = torch.compile(layer, backend="eager") if mode == "compiled" else layer
    y, _ = run(x, mask, token_ids=ids)
    assert y.isnan().any(dim=2).nonzero().tolist() == [[0, 2]]
    mask[0, 2] = False
    y, routing = run(x, mask, token_ids=ids)
    assert not y[mask].isnan().any()
    assert not routing.regularizer.isnan()
    torch._dynamo.reset()
