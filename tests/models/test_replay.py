"""Given pairs are executed: the pass they came from is repeated bit for bit, and other pairs give other outputs."""

import pytest
import tiny_models
import torch
from common_models import build, tokens

import remoe
from remoe.errors import ConfigError
from remoe.models.replay import replay_routing
from remoe.routing.replay import Replay, disagreement, executed_pairs


def relufied():
    model, ids = tiny_models.build("mixtral"), tiny_models.token_ids(2, 9)
    remoe.relufy(model, [ids], max_loss_increase=None)
    return model, ids


def ours(**options):
    return build(**options), tokens()


MODELS = {
    "relu": ours,
    "relu_scaled": lambda: ours(router="relu_scaled"),
    "topk": lambda: ours(router="topk", k=2),
    "renormalised": lambda: ours(router="topk", k=2, router_options={"renormalize": True}),
    "capped": lambda: ours(max_experts=2),
    "relufied": relufied,
}


def step(model, ids, mask=None):
    """Loss, gradients and counts of a training step."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, attention_mask=mask)
    output.loss.backward()
    pairs = model.sparsity._pairs_LE.clone()
    model.sparsity._pairs_LE.zero_()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return output, [output.loss.detach(), pairs, *gradients]


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("name", MODELS)
def test_its_own_pairs_repeat_a_training_step_bit_for_bit(name):
    model, ids = MODELS[name]()
    model.train().sparsity.lam.fill_(0.5)
    output, first = step(model, ids, padded(ids))
    with replay_routing(model, Replay.of(output.routings)):
        _, again = step(model, ids, padded(ids))
    assert len(first) == len(again)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["relu", "topk", "relufied"])
def test_recomputed_activations_are_replayed_too(name):
    model, ids = MODELS[name]()
    other = Replay.of(model(input_ids=ids.flip(1)).routings)
    model.train()
    with replay_routing(model, other):
        _, plain = step(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, recomputed = step(model, ids)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["relu", "topk", "relufied"])
@torch.no_grad()
def test_kept_gates_are_executed_by_other_routers(name):
    model, ids = MODELS[name]()
    kept = model(input_ids=ids)
    replay = Replay.of(kept.routings, keep_gates=True)
    for parameter_name, parameter in model.named_parameters():
        if ".router." in parameter_name or "mlp.gate." in parameter_name:
            parameter.normal_()
    assert not torch.equal(model(input_ids=ids).logits, kept.logits)
    with replay_routing(model, replay):
        assert torch.equal(model(input_ids=ids).logits, kept.logits)


@torch.no_grad()
def test_gates_of_given_pairs_are_those_of_the_router():
    layer, x_TD = remoe.MoE(6, 4, 5, 2, init_std=1.0).eval(), torch.randn(7, 6)
    active_TE = torch.rand(7, 5) < 0.5
    with replay_routing(layer, Replay([active_TE])):
        _, routing = layer(x_TD)
    assert torch.equal(routing.gate_TE, (x_TD @ layer.router.weight.T).relu() * active_TE)
    assert torch.equal(executed_pairs(routing), active_TE)  # a pair that the router closes too: its gate is zero
    assert torch.equal(routing.count_E, layer.router(x_TD).count_E)  # what lambda steers by
    assert torch.equal(layer(x_TD)[1].gate_TE, layer.router(x_TD).gate_TE)  # nothing is left behind


@torch.no_grad()
def test_unknown_tokens_are_routed_by_the_router():
    layer, x_TD = remoe.MoE(6, 4, 5, 2, init_std=1.0).eval(), torch.randn(7, 6)
    known_T = torch.arange(7) < 4
    for gates in (None, [torch.rand(7, 5)]):
        with replay_routing(layer, Replay([torch.ones(7, 5, dtype=torch.bool)], gates, known_T)):
            pairs_TE = executed_pairs(layer(x_TD)[1])
        assert pairs_TE[known_T].all()
        assert torch.equal(pairs_TE[~known_T], layer.router(x_TD).gate_TE[~known_T] > 0)


@pytest.mark.parametrize("name", ["relu", "relufied"])
@torch.no_grad()
def test_a_cap_or_threshold_leaves_given_pairs_alone(name):
    model, ids = MODELS[name]()
    other = Replay.of(model(input_ids=ids.flip(1)).routings)
    with replay_routing(model, other):
        expected = model(input_ids=ids).logits
    model.set_max_experts(1)
    model.set_gate_threshold(0.05)
    with replay_routing(model, other):
        output = model(input_ids=ids)
    assert torch.equal(output.logits, expected)
    known_T = torch.arange(ids.numel()) < 4
    with replay_routing(model, Replay(other.active_LTE, None, known_T)):
        routing = model(input_ids=ids).routings[0]
    assert torch.equal(executed_pairs(routing)[known_T], other.active_LTE[0][known_T])
    assert other.active_LTE[0][~known_T].sum(dim=1).max() > 1
    assert executed_pairs(routing)[~known_T].sum(dim=1).max() == 1  # the router's own pairs are limited as always


@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_fewer_slots_refuses_the_replay(training):
    model, ids = ours(max_experts=2)
    refused = pytest.raises(ConfigError, match="has 3 experts, but the model is for 2 at most")
    with refused, replay_routing(model.train(training), Replay([torch.tensor([[1, 1, 1, 0]] * 27).bool()] * 3)):
        model(ids)


@torch.no_grad()
def test_routers_that_an_adapter_wraps_are_replayed():
    peft = pytest.importorskip("peft")
    model, ids = ours()
    other = Replay.of(model(ids.flip(1)).routings)
    with replay_routing(model, other):
        expected = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["router"])).eval()
    with replay_routing(adapted, other):
        assert torch.equal(adapted(input_ids=ids).logits, expected)
    with torch.enable_grad(), replay_routing(adapted, other):
        routings = adapted(input_ids=ids).routings
    assert all(torch.equal(executed_pairs(one), given) for one, given in zip(routings, other.active_LTE, strict=True))


def test_disagreement_is_the_share_of_pairs_that_one_has():
    first = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    second = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0]]).bool()
    assert disagreement([first, first, first], [second, first, ~first]).tolist() == [0.25, 0.0, 1.0]
    assert disagreement([first & False], [first & False]).tolist() == [0.0]
    known_T = (first == second).all(dim=1)
    assert disagreement([first], [second], known_T).tolist() == [0.0]
    with pytest.raises(ConfigError, match="different sizes"):
        disagreement([first], [first, second])


@pytest.mark.parametrize(
    ("options", "replay", "message"),
    [
        ({}, Replay([torch.ones(27, 4).bool()] * 2), "2 layers, but the model has 3"),
        ({}, Replay([torch.ones(26, 4).bool()] * 3), r"must be \(27, 4\)"),
        ({}, Replay([torch.ones(27, 4).bool()] * 3, [torch.ones(27, 3)] * 3), "gates must be"),
        ({}, Replay([torch.ones(27, 4).bool()] * 3, None, torch.ones(3).bool()), "known_T must be"),
        ({"router": "dense"}, Replay([torch.ones(27, 4).bool()] * 3), "nothing to replay"),
        ({"router": "relu_norm"}, Replay([torch.ones(27, 4).bool()] * 3), "recorded gates"),
    ],
)
def test_what_does_not_fit_is_refused(options, replay, message):
    with pytest.raises(ConfigError, match=message), replay_routing(model := build(**options), replay):
        model(tokens())


def test_a_model_without_mixtures_is_refused():
    with pytest.raises(ConfigError, match="no layers"), replay_routing(torch.nn.Linear(2, 2), Replay([])):
        pass


def test_a_compiled_model_is_refused():
    model, ids = ours()
    replay = Replay.of(model(ids).routings)
    compiled = torch.compile(model, backend="eager")
    model_in_place, _ = ours()
    model_in_place.compile(backend="eager")
    for given in (compiled, model_in_place):
        with pytest.raises(ConfigError, match="compiled"), replay_routing(given, replay):
            pass


@pytest.mark.parametrize("name", ["relu", "relufied"])
def test_pairs_that_are_given_for_padding_are_left_out(name):
    model, ids = MODELS[name]()
    mask = padded(ids)
    routings = model(input_ids=ids, attention_mask=mask).routings
    replay = Replay([torch.ones_like(routing.gate_TE, dtype=torch.bool) for routing in routings])
    with replay_routing(model, replay):
        replayed = model(input_ids=ids, attention_mask=mask).routings
    for routing in replayed:
        assert torch.equal(executed_pairs(routing).all(dim=1), mask.flatten().bool())
