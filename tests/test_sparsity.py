"""The controller: lambda's course, statistics, state, and the plain loop that a user writes."""

import math
import statistics
from itertools import pairwise

import pytest
import reference
import torch

import remoe
from remoe.errors import ConfigError
from remoe.routing.assignment import Assignment, Routing
from remoe.sparsity import FAST_START_PENALTY, SMOOTH_MAX_STEP, SparsityController


def routing(active_TE, num_tokens=None):
    gate_TE = active_TE.float()
    tokens = torch.tensor(len(active_TE) if num_tokens is None else num_tokens)
    return Routing(Assignment.from_gates(gate_TE, active_TE), gate_TE, None, tokens, gate_TE.sum())


def batch(pairs, tokens=100, experts=8):
    """A routing with exactly `pairs` routed pairs."""
    return routing((torch.arange(tokens * experts) < pairs).view(tokens, experts))


def drive(controller, course_of_pairs):
    values = []
    for pairs in course_of_pairs:
        controller.observe([batch(pairs)])
        controller.update()
        values.append(controller.lam.item())
    return values


COURSE = [400, 420, 380, 300, 160, 90, 100, 100, 80, 110, 120, 99, 101, 0, 800] * 4  # 100 of 800 is the target


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


def test_smooth_rule_is_bounded_rests_at_the_target_and_moves_towards_it():
    controller = SparsityController(1, 8, 1, rule="smooth", lambda_init=1.0)
    values = [1.0, *drive(controller, COURSE)]
    steps = [math.log(b / a) for a, b in pairwise(values)]
    assert max(abs(step) for step in steps) <= SMOOTH_MAX_STEP + 1e-6
    resting = drive(controller, [100] * 60)
    assert resting[-1] == pytest.approx(resting[-2], rel=1e-6)
    assert drive(controller, [110] * 5)[-1] > resting[-1]
    resting = drive(controller, [100] * 60)
    assert drive(controller, [90] * 5)[-1] < resting[-1]


@pytest.mark.parametrize(("start", "lowest"), [(1.0, 1e-8), (1e-12, 1e-12)])
def test_smooth_rule_is_soon_back_after_experts_that_closed_by_themselves(start, lowest):
    controller = SparsityController(1, 8, 1, rule="smooth", lambda_init=start)
    assert min(drive(controller, [50] * 500)) == pytest.approx(lowest)
    steps_to_a_millionfold = math.log(1e6) / SMOOTH_MAX_STEP
    assert drive(controller, [400] * round(steps_to_a_millionfold + 5))[-1] > 1e6 * lowest


def train_layer(controller, steps):
    """A layer trained on a made-up task, as the user of the bare layer would; S of each step."""
    torch.manual_seed(3)
    layer = remoe.MoE(32, 64, 8, 1, init_std=0.1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3, betas=(0.9, 0.95))
    first, second, offset = torch.randn(32, 32) / 5, torch.randn(32, 32) / 5, torch.randn(32) * 0.3
    course = []
    for _ in range(steps):
        # Inputs symmetric about zero would keep half of the pairs whatever lambda is: the router has no bias.
        x = torch.randn(512, 32) + offset
        goal = torch.tanh(x @ first) * torch.sign(x[:, :1]) + torch.sin(3 * x @ second)
        y, routing = layer(x)
        loss = (y - goal).square().mean() + controller.lam * routing.regularizer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.observe([routing])
        controller.update()
        course.append(controller.sparsity.item())
    return torch.tensor(course, dtype=torch.float64)


@pytest.mark.slow
def test_smooth_rule_settles_a_trained_layer_closer_to_the_target_than_the_sign_rule():
    deviation = {}
    for rule in ("sign", "smooth"):
        course = train_layer(SparsityController(1, 8, 1, rule=rule, lambda_init=1e-3), 400)
        deviation[rule] = (course[200:] - 0.875).square().mean().sqrt().item()
    assert deviation["smooth"] < 0.05
    assert deviation["smooth"] < 0.5 * deviation["sign"]


def route_toy_data(num_experts, warmup, steps, lr, seed=0):
    """Largest lambda, and 40-step means of S, of a router whose learning rate rises for `warmup` steps."""
    torch.manual_seed(seed)
    E, D, T = num_experts, 32, 128
    router = remoe.ReLURouter(D, E, 1)
    router.reset_parameters(std=0.02)
    value_ED = torch.nn.Parameter(torch.randn(E, D) * 0.02)
    controller = SparsityController.of([router], rule="smooth")
    optimizer = torch.optim.AdamW([router.weight, value_ED], betas=(0.9, 0.95))
    centers, goals, offset = torch.randn(4 * E, D), torch.randn(4 * E, D), torch.randn(D)
    lambdas, course = [], []
    for step in range(1, steps + 1):
        fraction = min(1.0, step / warmup)
        optimizer.param_groups[0]["lr"] = lr * fraction
        kind = torch.randint(4 * E, (T,))
        x = torch.nn.functional.rms_norm(centers[kind] + offset + torch.randn(T, D) * 0.3, (D,))
        routing = router(x)
        loss = (routing.gate_TE @ value_ED - goals[kind]).square().mean() + controller.loss_terms([routing]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.observe([routing])
        controller.update(lr_fraction=fraction)
        lambdas.append(controller.lam.clone())
        course.append(controller.sparsity.clone())
    return max(lambdas).item(), torch.stack(course).unfold(0, 40, 1).mean(dim=1)


@pytest.mark.parametrize(
    ("num_experts", "warmup", "steps", "lr"),
    [(16, 1000, 430, 4e-3), (8, 10, 200, 8e-3)],
    ids=["slow warm-up", "large learning rate"],
)
def test_smooth_rule_holds_the_target_at_every_pace_of_the_learning_rate(num_experts, warmup, steps, lr):
    largest, mean_S = route_toy_data(num_experts, warmup, steps, lr)
    error = (mean_S - (1 - 1 / num_experts)).abs()
    settled = (error < 0.01).nonzero()[0].item()
    assert settled < len(error) - 40
    assert error[settled:].max() < 0.02
    assert largest < 1  # what holds S is 0.1; a lambda that grew at its own pace would pass 1e4 in the slow warm-up


def test_smooth_rule_overshoots_less_with_few_experts_and_a_large_learning_rate():
    deviations = []
    for seed in range(3):
        error = (route_toy_data(8, 10, 200, 8e-3, seed)[1] - 7 / 8).abs()
        deviations.append(error[(error < 0.01).nonzero()[0].item() :].max().item())
    assert sum(deviations) / 3 < 0.02  # 0.034 with the error in log density, and nothing that opens experts


def test_the_smooth_rule_counts_how_far_logits_must_move():
    controller = SparsityController(1, 4, 1, rule="smooth")
    controller.observe([batch(200, experts=4)])
    controller.update()
    normal = statistics.NormalDist()
    assert controller.mean_error.item() == pytest.approx(normal.inv_cdf(0.5) - normal.inv_cdf(0.25), rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "pairs", "opening"),
    [("smooth", 92, 4 * 0.25 * (0.02 - 0.005)), ("smooth", 0, 0.03), ("smooth", 99, 0), ("sign", 0, 0)],
)
def test_only_the_smooth_rule_opens_experts_and_only_far_above_the_target(rule, pairs, opening):
    controller = SparsityController(1, 4, 1, rule=rule)  # 100 of 400 pairs are the target
    controller.observe([batch(pairs, experts=4)])
    controller.update()
    assert controller.opening.item() == pytest.approx(opening, rel=1e-3)


@pytest.mark.parametrize("kind", ["relu", "relu_scaled", "relu_norm"])
def test_experts_that_are_closed_for_every_token_open_again(kind):
    layer = remoe.MoE(8, 8, 4, 1, kind, init_std=0.02)
    controller = SparsityController.of([layer], rule="smooth")
    x, mask = torch.rand(64, 8) + 0.5, torch.arange(64) < 50
    x[50:] = -x[50:]  # padding, for which the same weights are open
    with torch.no_grad():
        layer.router.weight.copy_(-layer.router.weight.abs() - 0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(100):
        routing = layer(x, mask)[1]
        optimizer.zero_grad()
        controller.loss_terms([routing]).total.backward()
        optimizer.step()
        controller.observe([routing])
        controller.update()
    assert routing.sparsity.item() < 0.99
    assert layer.eval()(x, mask)[1].closed_loss is None


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
