"""The routing of any mixture is what its routers answered, and an expert that is switched off adds nothing."""

import copy

import pytest
import torch
import transformers
from common_models import build as build_ours
from packaging import version
from tiny_models import MIXTURES, SINCE_5_23, build, token_ids

import remoe
from remoe.errors import ConfigError
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.texts import Batch

FAST = ("mixtral", "deepseek_v3", "gpt_oss")
NEEDS = pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="transformers 5.23")
TYPES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST) + [NEEDS] * (name in SINCE_5_23))
    for name in MIXTURES
]


class Ids:
    """A text of given token ids (N, S)."""

    def __init__(self, ids_NS):
        self.ids_NS, self.seq_len, self.identity = ids_NS, ids_NS.shape[1], {}

    def batches(self, rows):
        for start in range(0, len(self.ids_NS), rows):
            ids_NS = self.ids_NS[start : start + rows]
            target_NS = torch.nn.functional.pad(ids_NS[:, 1:], (0, 1), value=-100)
            yield Batch("ids", ids_NS, target_NS, torch.ones_like(ids_NS, dtype=torch.bool))


def silenced(model, name, expert):
    """A copy of the model in which an expert's output is zero, by its weights."""
    changed = copy.deepcopy(model)
    experts = changed.get_submodule(name.rpartition(".")[0]).experts
    with torch.no_grad():
        experts.down_proj[expert] = 0
        if getattr(experts, "has_bias", False):
            experts.down_proj_bias[expert] = 0
    return changed


@pytest.mark.parametrize("name", TYPES)
def test_a_mixture_of_transformers(name):
    model, ids = build(name), token_ids(2)
    mixture = Mixture(model)
    assert (mixture.experts, mixture.k, mixture.router) == (4, 2, "topk")
    record = record_routing(mixture, Ids(ids))
    block = record.whole(gates=True)
    assert (block.active_LTE.sum(dim=2) == 2).all()
    assert block.active_LTE.shape == (mixture.layers, ids.numel(), 4)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(block.loss_T.nanmean(), nats, rtol=1e-5, atol=1e-5)
        # An expert without an effect on any gate: those of the last layer change nothing but the output.
        layer = mixture.layers - 1
        expert = int(block.active_LTE[layer].sum(dim=0).argmax())
        expected = silenced(model, [*mixture.routers][layer], expert)(ids, use_cache=False).logits
        with mixture.without(layer, expert):
            found, _ = mixture.run(ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - logits).abs().max() > 1e-3
        torch.testing.assert_close(mixture.run(ids)[0], logits)  # the hook is gone


def test_gates_are_those_of_the_router():
    model, ids = build("mixtral"), token_ids(1, 7)
    _, layers = Mixture(model).run(ids)
    hidden = []
    hook = model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    prob_TE = (hidden[0].reshape(7, -1) @ model.model.layers[0].mlp.gate.weight.T).softmax(dim=1)
    for t in range(7):
        best = prob_TE[t].topk(2).indices.tolist()
        assert set(layers[0].active_TE[t].nonzero().flatten().tolist()) == set(best)
        for expert in best:
            share = prob_TE[t, expert] / prob_TE[t, best].sum()
            torch.testing.assert_close(layers[0].gate_TE[t, expert], share)


def test_a_relufied_model_executes_its_positive_gates():
    model, ids = build("mixtral"), token_ids(2)
    remoe.relufy(model, [token_ids()], max_loss_increase=None)
    mixture, gates, inputs = Mixture(model), [layer.mlp.gate for layer in model.model.layers], []
    assert (mixture.router, mixture.k, mixture.steered) == ("relu", 2, True)
    hooks = [gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for gate in gates]
    with torch.no_grad():
        _, layers = mixture.run(ids)
    for hook in hooks:
        hook.remove()
    for layer, gate, x in zip(layers, gates, inputs, strict=True):
        expected_TE = (x.reshape(ids.numel(), -1) @ gate.weight.T + gate.bias).relu()
        torch.testing.assert_close(layer.gate_TE, expected_TE)
        assert torch.equal(layer.active_TE, layer.gate_TE > 0)
        assert 0 < layer.active_TE.float().mean() < 1


@pytest.mark.parametrize("router", ["relu", "topk", "sigmoid"])
def test_an_expert_of_ours_that_is_off_equals_one_whose_output_is_zero(router):
    model, ids = build_ours(router=router, num_experts_per_tok=2), torch.randint(1, 99, (3, 9))
    mixture = Mixture(model)
    with torch.no_grad():
        plain, layers = mixture.run(ids)
        expert = int(layers[1].active_TE.sum(dim=0).argmax())
        changed = copy.deepcopy(model)
        changed.model.layers[1].mlp.experts.down_proj[expert] = 0
        with mixture.without(1, expert):
            found, _ = mixture.run(ids)
        torch.testing.assert_close(found, changed(ids).logits, rtol=1e-5, atol=1e-5)
        assert (found - plain).abs().max() > 1e-4
        assert torch.equal(mixture.run(ids)[0], plain)


def test_what_has_no_mixture_is_refused():
    with pytest.raises(ConfigError, match="no mixture of experts"):
        Mixture(build("llama"))
    with pytest.raises(ConfigError, match="'lory' does not send"):
        Mixture(build_ours(router="lory"))
