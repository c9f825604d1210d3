"""The effect of an expert is the loss of a model in which its output is zero, minus the model's own."""

import copy

import pytest
import torch
from common_models import build

from remoe.errors import ConfigError
from remoe.lab.analysis.effect import expert_effects
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.texts import PreparedText, Prompt
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.training.validate import evaluate

SEQ_LEN = 32


@pytest.mark.parametrize("document_end", [None, 0])
def test_effects_are_differences_of_losses(corpus, document_end):
    model = build(vocab_size=open_dataset(corpus).vocab_size, num_hidden_layers=2, eos_token_id=0)
    windows = ValidationWindows(open_dataset(corpus).validation, SEQ_LEN)
    text, domains = PreparedText(windows, 400), ["farm", "town"]
    found = expert_effects(Mixture(model), text, domains, 10**6, document_end=document_end)
    options = {"batch_size": 8, "max_tokens": 400, "document_end": document_end}
    before = evaluate(model, windows, **options)
    assert found.tokens_C.tolist() == [before[name].targets for name in domains]
    assert found.loss_C.tolist() == pytest.approx([before[name].loss for name in domains], rel=1e-5)
    for layer, expert in ((0, 1), (1, 3)):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.model.layers[layer].mlp.experts.down_proj[expert] = 0
        after = evaluate(changed, windows, **options)
        expected = [after[name].loss - before[name].loss for name in domains]
        assert found.effect_CLE[:, layer, expert].tolist() == pytest.approx(expected, abs=2e-5)
        assert max(map(abs, expected)) > 1e-3
        nats = sum((after[name].nats - before[name].nats) for name in domains)
        whole = nats / sum(one.targets for one in before.values())
        assert found.effect_LE[layer, expert].item() == pytest.approx(whole, abs=2e-5)


def test_few_tokens_are_a_sequence_of_each_domain_and_an_idle_expert_has_no_effect(corpus):
    model = build(vocab_size=open_dataset(corpus).vocab_size, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight[2] = 0
    text = PreparedText(ValidationWindows(open_dataset(corpus).validation, SEQ_LEN), None)
    found = expert_effects(Mixture(model), text, ["farm", "town"], 1)
    assert found.tokens_C.tolist() == [SEQ_LEN, SEQ_LEN]
    assert found.effect_CLE[:, 0, 2].tolist() == [0, 0]
    assert found.effect_LE[0].count_nonzero() == 3
    many = expert_effects(Mixture(model), text, ["farm", "town"], 2 * 3 * SEQ_LEN)
    assert many.tokens_C.tolist() == [3 * SEQ_LEN, 3 * SEQ_LEN]


def test_a_prompt_of_one_token_has_no_loss_to_change():
    def one_token(text, add_special_tokens):
        return {"input_ids": [3]}

    text = Prompt("a", one_token, SEQ_LEN, special=False)
    with pytest.raises(ConfigError, match="two tokens or more"):
        expert_effects(Mixture(build(num_hidden_layers=1)), text, ["prompt"], 8)
