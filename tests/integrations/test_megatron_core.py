"""The adapter for megatron-core: the same gates, penalty and lambda as ours and the formulas, and its guards."""

from types import SimpleNamespace

import pytest
import torch

from remoe.errors import ConfigError
from remoe.integrations.megatron import MegatronRouters
from remoe.routing import ReLURouter
from remoe.sparsity import SparsityController

T, D, E, K, L = 10, 6, 4, 2, 3


def config(**changes):
    values = {
        "num_layers": L,
        "num_moe_experts": E,
        "moe_router_topk": K,
        "hidden_size": D,
        "perform_initialization": True,
        "init_method": lambda weight: torch.nn.init.normal_(weight, std=1.0),
        "params_dtype": torch.float32,
        "calculate_per_token_loss": False,
        "moe_token_dispatcher_type": "allgather",
        "moe_expert_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
    }
    return SimpleNamespace(**(values | changes))


def build(routers, **changes):
    layers = [routers(config=config(**changes), pg_collection=None) for _ in range(L)]
    for number, layer in enumerate(layers, 1):
        layer.set_layer_number(number)
    return layers


@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_gates_penalty_and_lambda_equal_the_formulas_and_our_own(normalization):
    torch.manual_seed(0)
    options = {"rule": "smooth", "lambda_init": 0.1, "regularizer_normalization": normalization}
    routers = MegatronRouters(**options)
    layers, x_TD, mask_T = build(routers), torch.randn(T, D), torch.arange(T) < 8
    own = [ReLURouter(D, E, K) for _ in range(L)]
    for ours, theirs in zip(own, layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    controller = SparsityController.of(own, **options)
    routings, expected = [layer.route(x_TD, mask_T) for layer in layers], [layer(x_TD, mask_T) for layer in own]
    total = 0.0
    for layer, routing in zip(layers, routings, strict=True):
        gate_TE = torch.relu(x_TD @ layer.weight.T) * mask_T[:, None]
        torch.testing.assert_close(routing.gate_TE, gate_TE)
        f_E = (gate_TE > 0).sum(0) * E / (K * 8)
        total = total + (f_E * gate_TE).sum() / 8
    terms = sum(layer.penalty_term(routing) for layer, routing in zip(layers, routings, strict=True))
    torch.testing.assert_close(terms, 0.1 * total / (L if normalization == "paper" else 1))
    torch.testing.assert_close(terms, controller.loss_terms(expected).total)
    controller.observe(expected)
    controller.update()
    routers.update()
    density = sum(int(routing.count_E.sum()) for routing in routings) / (L * 8 * E)
    assert routers.controller.sparsity.item() == pytest.approx(1 - density)
    for name, value in controller.state_dict().items():
        assert torch.equal(routers.controller.state_dict()[name], value), name


def test_experts_are_opened_and_lifted_as_our_own():
    options = {"rule": "smooth", "lambda_init": 0.1}
    routers, x_TD = MegatronRouters(**options), torch.rand(40 * E, D)
    layers, own = build(routers), [ReLURouter(D, E, K) for _ in range(L)]
    for ours, theirs in zip(own, layers, strict=True):
        with torch.no_grad():
            theirs.weight.copy_(-theirs.weight.abs())  # all are closed
        ours.load_state_dict(theirs.state_dict())
    controller = SparsityController.of(own, **options)
    for _ in range(2):  # at the second pass, `opening` is above zero
        routings, expected = [layer.route(x_TD) for layer in layers], [layer(x_TD) for layer in own]
        terms = sum(layer.penalty_term(routing) for layer, routing in zip(layers, routings, strict=True))
        assert terms > 0
        torch.testing.assert_close(terms, controller.loss_terms(expected).total)
        controller.observe(expected)
        controller.update()
        routers.update()
    assert controller.opening > 0


def test_evaluation_counts_nothing_and_losses_per_token_are_scaled():
    routers = MegatronRouters(lambda_init=0.5)
    (first, *_), x_TD = build(routers, calculate_per_token_loss=True), torch.randn(T, D)
    routing = first.route(x_TD)
    torch.testing.assert_close(first.penalty_term(routing), 0.5 * routing.regularizer / L * T)
    gate_TE, map_TE = first.eval()(x_TD.view(5, 2, D), torch.zeros(5, 2, dtype=torch.bool))
    assert torch.equal(map_TE, gate_TE > 0)
    assert torch.equal(gate_TE, routing.gate_TE)
    assert routers.controller._tokens_L.tolist() == [T, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "keeps only moe_router_topk experts"),
        ({"moe_token_dispatcher_type": "alltoall"}, "assumes moe_router_topk pairs"),
        ({"moe_pad_expert_input_to_capacity": True}, "drops pairs"),
        ({"moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff"),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function"),
        ({"context_parallel_size": 2}, "context_parallel_size"),
    ],
)
def test_settings_that_would_lose_pairs_or_be_ignored_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(MegatronRouters(), **changes)


def test_all_to_all_that_counts_its_pairs_is_taken_and_an_unused_builder_is_told():
    build(MegatronRouters(), moe_token_dispatcher_type="alltoall", moe_expert_capacity_factor=1.0)
    with pytest.raises(ConfigError, match="no router has been built"):
        MegatronRouters().update()


def test_the_penalty_reaches_the_gradient_through_megatron_core():
    scaler = pytest.importorskip(
        "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed"
    ).MoEAuxLossAutoScaler
    scaler.set_loss_scale(torch.tensor(2.0))
    (first, *_), x_TD = build(MegatronRouters(lambda_init=0.5)), torch.randn(T, D)
    gate_TE, map_TE = first(x_TD.view(5, 2, D))
    assert torch.equal(map_TE, gate_TE > 0)
    (0 * gate_TE).sum().backward()
    (expected,) = torch.autograd.grad(2.0 * first.penalty_term(first.route(x_TD)), first.weight)
    torch.testing.assert_close(first.weight.grad, expected)
