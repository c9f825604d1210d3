"""A controller made for layers: what it knows of them, the loss (Eq. 6), and routers with state of their own."""

import copy

import pytest
import torch

import remoe
from remoe.errors import ConfigError
from remoe.sparsity import SparsityController


@pytest.mark.parametrize(("router", "sizes"), [("relu", (8, 2)), ("topk", (8, 2)), ("dense", (1, 1)), ("lory", (1, 1))])
def test_a_controller_knows_its_layers(router, sizes):
    k, granularity = (1, 2) if router != "lory" else (1, 1)
    layers = [remoe.MoE(6, 8, 4, k, router, granularity) for _ in range(3)]
    control = SparsityController.of(layers, rule="smooth", router_aux_loss_coef=0.5)
    E, k = sizes
    assert control.load_LE.shape == (3, E)
    assert control.target == pytest.approx(1 - k / E)
    assert control.rule == ("smooth" if router == "relu" else "none")
    assert control.coefficient == pytest.approx(1e-8 if router == "relu" else 0.5)
    assert not list(control.parameters())
    assert not list(control.children())


def test_layers_of_several_kinds_are_refused():
    layers = [remoe.MoE(6, 8, 4, 1), remoe.MoE(6, 8, 4, 2)]
    with pytest.raises(ConfigError, match="2 kinds"):
        SparsityController.of(layers)
    with pytest.raises(ConfigError, match="at least one layer"):
        SparsityController.of([])


def test_an_update_moves_every_router_with_state_of_its_own():
    layers = [remoe.MoE(6, 8, 4, 1, "sigmoid") for _ in range(2)]
    control = SparsityController.of(layers)
    control.observe([layer(torch.randn(50, 6))[1] for layer in layers])
    control.update()
    assert all(layer.router.bias_E.any() for layer in layers)


@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_the_loss_is_equation_6(normalization):
    layers = [remoe.MoE(6, 8, 4, 1, "relu_norm", router_options={"locality": 0.5}) for _ in range(3)]
    control = SparsityController.of(layers, lambda_init=0.3, regularizer_normalization=normalization)
    routings = [layer(torch.randn(50, 6))[1] for layer in layers]
    regularizer = sum(r.regularizer.item() for r in routings) / (3 if normalization == "paper" else 1)
    extra = sum(r.extra_loss.item() for r in routings) / 3
    terms = control.loss_terms(routings)
    assert terms.coefficient == control.lam == pytest.approx(0.3)
    assert terms.regularizer.item() == pytest.approx(regularizer)
    assert terms.extra.item() == pytest.approx(extra)
    assert terms.total.item() == pytest.approx(0.3 * regularizer + extra)
    assert control.loss_terms(routings, share=0.25).total.item() == pytest.approx(terms.total.item() / 4)
    assert control.eval().loss_terms(routings).total.item() == pytest.approx(0.3 * regularizer)
    terms.total.backward()
    assert all(layer.router.weight.grad.any() for layer in layers)


def test_layers_may_come_from_a_generator():
    layers = [remoe.MoE(6, 8, 4, 1, "topk") for _ in range(2)]
    control = SparsityController.of(layer for layer in layers)
    assert len(control.routers) == 2
    assert not control.steered


def test_a_layer_that_replaces_another_is_moved():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, router="sigmoid")).train()
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    ids = torch.randint(32, (2, 8))
    model(ids, labels=ids)
    model.update_routing()
    assert all(layer.mlp.router.bias_E.any() for layer in model.model.layers)


def test_only_terms_of_a_training_loss_count_as_penalised():
    layer = remoe.MoE(6, 8, 4, 1)
    control = SparsityController.of([layer])
    routings = [layer(torch.randn(5, 6))[1]]
    control.observe(routings)
    assert control.coefficient > 0
    assert control.regularizer(routings) > 0
    assert not control.penalised
    control.eval().loss_terms(routings)
    assert not control.penalised
    control.train().loss_terms(routings)
    assert control.penalised
    control.update()
    assert not control.penalised
