"""The controller: lambda's course, statistics, state, and the plain loop that a user writes."""

import math

import pytest
import reference
import torch
from steering import COURSE, batch, drive, routing

import remoe
from remoe.errors import ConfigError
from remoe.sparsity import FAST_START_PENALTY, SparsityController


def test_sign_rule_is_equation_7():
    controller = SparsityController(1, 8, 1)
    expected = reference.lambda_course([1 - pairs / 800 for pairs in COURSE], 1 - 1 / 8)
    assert drive(controller, COURSE) == pytest.approx(expected, rel=1e-5)


def test_official_rule_counts_equality_as_too_sparse():
    assert drive(SparsityController(1, 8, 1, lambda_init=1.0), [100]) == [1.0]
    assert drive(SparsityController(1, 8, 1, rule="official", lambda_init=1.0), [100]) == pytest.approx([1 / 1.2])
    assert drive(SparsityController(1, 8, 1, rule="official", lambda_init=1.0), [101]) == pytest.approx([1.2])


@pytest.mark.parametrize(("experts", "k"), [(3, 1), (5, 3), (6, 2), (7, 5), (24, 6), (64, 7)])
def test_exactly_at_the_target_lambda_rests(experts, k):
    controller = SparsityController(1, experts, k, lambda_init=1.0)
    controller.observe([batch(100 * k, tokens=100, experts=experts)])
    controller.update()
    assert controller.lam == 1.0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_the_learning_rate_is_a_fraction_of_its_peak(fraction):
    with pytest.raises(ConfigError, match="lr_fraction must be between 0 and 1"):
        SparsityController(1, 8, 1).update(lr_fraction=fraction)


def test_only_the_smooth_rule_follows_the_learning_rate():
    for rule, expected in (("smooth", 1.0), ("sign", 1.2), ("official", 1.2), ("none", 1.0)):
        controller = SparsityController(1, 8, 1, rule=rule, lambda_init=1.0)
        controller.observe([batch(400)])
        controller.update(lr_fraction=0.0)
        assert controller.lam.item() == pytest.approx(expected)


def test_fast_start_sets_the_penalty_once_and_then_leaves_the_rule_alone():
    controller = SparsityController(2, 8, 1, fast_start=True)
    first, second = batch(400), batch(200)
    for _ in range(2):
        controller.observe([first, second])
    controller.update()
    penalty = (first.regularizer + second.regularizer) / 2
    assert controller.lam.item() * penalty.item() == pytest.approx(FAST_START_PENALTY)
    before = controller.lam.item()
    controller.observe([first, second])
    controller.update()
    assert controller.lam.item() == pytest.approx(before * 1.2)


def test_fast_start_neither_lowers_lambda_nor_divides_by_zero():
    controller = SparsityController(1, 8, 1, fast_start=True, lambda_init=0.5)
    assert drive(controller, [400]) == pytest.approx([0.6])
    assert drive(SparsityController(1, 8, 1, fast_start=True, lambda_init=0.5), [0]) == pytest.approx([0.5 / 1.2])


def test_statistics_are_summed_over_layers_and_micro_batches_and_ignore_padding():
    controller = SparsityController(2, 8, 1)
    first, second = torch.rand(30, 8) < 0.3, torch.rand(50, 8) < 0.6
    mask = torch.rand(50) > 0.5
    second &= mask[:, None]
    for layers in ((first, first[:20]), (second, second)):
        counts = [len(layers[0]), len(layers[1])]
        if layers[0] is second:
            counts = [int(mask.sum())] * 2
        controller.observe([routing(a, n) for a, n in zip(layers, counts, strict=True)])
    controller.update()
    pairs = first.sum() + first[:20].sum() + 2 * second.sum()
    slots = 8 * (30 + 20 + 2 * mask.sum())
    assert controller.sparsity.item() == pytest.approx((1 - pairs / slots).item(), abs=1e-6)
    load = (first.sum(0) + second.sum(0)) / (30 + mask.sum())
    torch.testing.assert_close(controller.load_LE[0], load)


def test_fast_start_leaves_measuring_and_dense_models_alone():
    for options in ({"rule": "none"}, {"k": 8}):
        controller = SparsityController(**{"num_layers": 1, "num_experts": 8, "k": 1, "fast_start": True, **options})
        assert drive(controller, [400])[0] <= 1.2e-8


@pytest.mark.parametrize("rule", ["sign", "official", "smooth", "none"])
def test_without_tokens_nothing_moves(rule):
    controller = SparsityController(1, 8, 1, rule=rule, fast_start=True)
    drive(controller, [400])
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    controller.update()
    controller.observe([routing(torch.zeros(5, 8, dtype=torch.bool), num_tokens=0)])
    controller.update()
    assert all(torch.equal(value, before[name]) for name, value in controller.state_dict().items())


@pytest.mark.parametrize("router", ["topk", "sigmoid", "threshold", "expert_choice"])
def test_without_tokens_no_router_moves(router):
    options = {"warmup_k": 3, "warmup_steps": 5} if router == "topk" else {}
    config = remoe.RemoeConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        router=router,
        router_options=options,
    )
    model = remoe.RemoeForCausalLM(config).train()

    def state():
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    before = state()
    model.update_routing()
    assert all(torch.equal(value, before[name]) for name, value in state().items())
    ids = torch.randint(32, (2, 8))
    model(ids, labels=ids)
    model.update_routing()
    before = state()
    assert 1 - model.sparsity.load_LE.mean().item() == pytest.approx(model.sparsity.sparsity.item(), abs=1e-6)
    model.update_routing()
    assert all(torch.equal(value, before[name]) for name, value in state().items())


def test_routings_of_another_model_are_refused():
    control = SparsityController(2, 4, 1)
    routings = {E: remoe.MoE(6, 8, E, 1)(torch.randn(3, 6))[1] for E in (4, 8)}
    for given, words in (([routings[4]], "but got: 4$"), ([routings[4], routings[8]], "but got: 4, 8$")):
        with pytest.raises(ConfigError, match=f"a routing of 4 experts for each of 2 layers, {words}"):
            control.observe(given)
    with pytest.raises(ConfigError, match="num_layers"):
        SparsityController(0, 4, 1)


def test_steps_without_a_pair_are_counted_for_each_layer():
    controller = SparsityController(3, 8, 1)
    alive, dead = batch(100), batch(0)
    for _ in range(5):
        controller.observe([alive, dead, alive])
        controller.update()
    assert controller.dead_steps_L.tolist() == [0, 5, 0]
    controller.update()  # without a token nothing moves
    assert controller.dead_steps_L.tolist() == [0, 5, 0]
    controller.observe([alive, batch(1), alive])
    controller.update()
    assert controller.dead_steps_L.tolist() == [0, 0, 0]


def test_state_is_float32_in_the_state_dict_whatever_the_dtype():
    controller = SparsityController(2, 8, 1, lambda_init=1.2345678e-8)
    controller.observe([batch(400), batch(300)])
    controller.update()
    before = controller.lam.clone()
    controller.to(torch.bfloat16)
    assert torch.equal(controller.lam, before)
    assert all(value.dtype == torch.float32 for value in controller.state_dict().values())
    other = SparsityController(2, 8, 1)
    other.load_state_dict(controller.state_dict())
    for c in (controller, other):
        c.observe([batch(200), batch(100)])
        c.update()
    assert torch.equal(controller.lam, other.lam)


def test_lambda_never_becomes_zero_or_infinite():
    controller = SparsityController(1, 8, 8)
    drive(controller, [0] * 400)
    assert 0 < controller.lam.item() < 1e-20
    controller = SparsityController(1, 8, 1, alpha=10)
    drive(controller, [800] * 100)
    assert math.isfinite(controller.lam.item())


def test_recomputation_of_the_whole_model_counts_once():
    layer = remoe.MoE(16, 32, 4, 1)
    controller = SparsityController(1, 4, 1)
    x = torch.randn(10, 16, requires_grad=True)

    def forward(x):
        y, routing = layer(x)
        controller.observe([routing])
        return y + routing.regularizer

    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert controller._tokens_L.tolist() == [10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "signs"}, "unknown sparsity rule 'signs'"),
        ({"k": 9}, "k = 9 and E = 8"),
        ({"alpha": 1.0}, "alpha > 1"),
        ({"lambda_init": 0.0}, "lambda_init > 0"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        SparsityController(**{"num_layers": 1, "num_experts": 8, "k": 1, **options})


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_number_of_routings_than_layers_is_refused(number):
    layers = [remoe.MoE(6, 8, 4, 1), remoe.MoE(6, 8, 4, 1)]
    control = SparsityController.of(layers)
    routings = [layers[0](torch.randn(5, 6))[1]] * number
    for function in (control.loss_terms, control.regularizer, control.observe):
        with pytest.raises(ConfigError, match=f"2 layers, but (got|{number} were given)"):
            function(routings)


@pytest.mark.parametrize("sizes", [(1.5, 8, 1), (1, 8.0, 1), (1, 8, 1.5), (1, 8, float("nan"))])
def test_sizes_are_whole_numbers(sizes):
    with pytest.raises(ConfigError, match="must be a whole number"):
        SparsityController(*sizes)
