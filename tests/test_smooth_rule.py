"""The smooth rule: lambda's steps, the opening of experts, and small layers that it steers."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from steering import COURSE, batch, drive

import remoe
from remoe.sparsity import SMOOTH_IDLE_PENALTY, SMOOTH_MAX_STEP, SparsityController


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("density", "sign"), [(0.23, -1), (0.27, 1)])
def test_smooth_rule_follows_the_mean_of_unequal_batches_at_a_low_learning_rate(density, sign, seed):
    controller = SparsityController(1, 4, 1, rule="smooth", lambda_init=1.0)
    densities = torch.distributions.Beta(16 * density, 16 * (1 - density))
    torch.manual_seed(seed)
    for pairs in (400 * densities.sample((600,))).round().tolist():
        controller.observe([batch(pairs, experts=4)])
        controller.update(lr_fraction=0.1)
    # The bound on steps cuts the noise of the damping unevenly, which once outweighed the pull: +2.7 and -0.03.
    assert sign * controller.lam.log().item() > 5


def test_lambda_is_quickly_back_where_its_penalty_does_nothing():
    slightly_dense = 110  # of 800 pairs, where 100 are the target; all gates are 1, so that L_reg is 110
    controller = SparsityController(1, 8, 1, rule="smooth", lambda_init=1e-7)
    course = [1e-7, *drive(controller, [slightly_dense] * 30)]
    for before, after in pairwise(course):
        if 110 * before < SMOOTH_IDLE_PENALTY:
            assert after / before == pytest.approx(1.5, rel=1e-5)
        else:
            assert 1 < after / before < 1.1
    assert 110 * course[-1] > SMOOTH_IDLE_PENALTY


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
    [("smooth", 94, 64 / 64 * (0.98 * 0.25 - 0.235)), ("smooth", 0, 0.054 / 4), ("smooth", 99, 0), ("sign", 0, 0)],
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
    x, mask = torch.rand(64, 8) + 0.5, torch.arange(64) < 50  # too few tokens for the loss of starved experts
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


@pytest.mark.parametrize("kind", ["relu", "relu_scaled", "relu_norm"])
@pytest.mark.parametrize("rule", ["smooth", "sign"])
def test_the_smooth_rule_lifts_a_starved_expert_though_s_is_on_target(kind, rule):
    T, E = 192, 4
    options = {"penalty": "l1"} if kind == "relu_scaled" else {}
    layer = remoe.MoE(E, 8, E, 1, kind, init_std=0.02, router_options=options)
    controller = SparsityController.of([layer], rule=rule)
    x, mask = torch.eye(E).repeat(T // E + 8, 1), torch.arange(T + 8 * E) < T
    with torch.no_grad():  # none for the last expert
        layer.router.weight.copy_(torch.tensor([[1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, -1, -1]]))
    routing = layer(x, mask)[1]
    controller.observe([routing])
    controller.update()
    assert routing.count_E.tolist() == [48, 48, 96, 0]
    assert controller.opening == 0
    (controller.loss_terms([routing]).total - controller.coefficient * routing.regularizer).backward()
    grad = layer.router.weight.grad
    assert not grad[:3].any()
    # 0.008 k/E times the mean over the tokens of max(0, -logit): a quarter of the tokens have each of the four inputs
    assert grad[3].tolist() == pytest.approx([-0.002 / 4 if rule == "smooth" else 0] * 4)
    assert layer.eval()(x, mask)[1].extra_loss is None


def test_the_lift_is_added_to_the_locality_loss():
    extra = []
    for rule in ("sign", "smooth"):
        torch.manual_seed(0)
        layer = remoe.MoE(4, 8, 4, 1, "relu_norm", router_options={"locality": 0.5})
        SparsityController.of([layer], rule=rule)
        with torch.no_grad():
            layer.router.weight.copy_(torch.tensor([1.0, 1, 1, -1])[:, None].expand(4, 4))
        routing = layer(torch.rand(200, 4))[1]
        extra.append(routing.extra_loss.item())
    assert routing.count_E.tolist() == [200, 200, 200, 0]
    assert extra[1] - extra[0] == pytest.approx(-0.002 * routing.logits_TE[:, 3].mean().item(), rel=1e-3)


def test_an_expert_is_starved_by_the_tokens_of_the_step_so_far():
    layer, x = remoe.MoE(4, 8, 4, 1), torch.eye(4).repeat(30, 1)  # a share of 30 tokens is too small to tell
    with torch.no_grad():
        layer.router.weight.copy_(2 * torch.eye(4) - torch.tensor([1.0, 1, 1, 3])[:, None])
    controller = SparsityController.of([layer], rule="smooth")
    layer.router.global_load = True
    lifts = []
    for _ in range(2):
        routing = layer(x)[1]
        lifts.append(routing.extra_loss.item())
        controller.carry_load([routing])
    assert lifts == [0, pytest.approx(0.002 * (3 * 3 + 1) / 4)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("relu", {"load_balance": False}), ("relu_scaled", {}), ("relu_norm", {"penalty": "chunk"})],
)
def test_a_router_that_does_not_balance_opens_all_experts_alike_and_lifts_none(kind, options):
    layer = remoe.MoE(4, 8, 4, 1, kind, router_options=options, init_std=0.02)
    SparsityController.of([layer], rule="smooth")
    with torch.no_grad():
        layer.router.weight.copy_(-layer.router.weight.abs())
    routing = layer(torch.rand(200, 4))[1]
    assert routing.extra_loss is None
    assert routing.closed_loss.item() == pytest.approx(-4 * routing.logits_TE.mean().item())
