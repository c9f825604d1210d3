"""Gate threshold and cap as arguments of a call, for a batch and for each of its rows."""

import pytest
import torch
from common_models import build, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from remoe.errors import ConfigError
from remoe.experts.cpu.backend import few_tokens
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import ROUTERS

ROWS = [(0.0, 5), (0.02, 5), (0.0, 1), (0.01, 2)]  # (gate threshold, cap), of which the first is no limit


def model_of(**options):
    torch.manual_seed(0)
    return build(**options)


def set_dial(model: RemoeForCausalLM, threshold: float, cap: int | None) -> None:
    model.set_gate_threshold(threshold)
    model.set_max_experts(cap)


def write(model, ids, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"max_experts": 3}, {"router": "topk", "num_experts_per_tok": 2}],
    ids=["relu", "capped", "topk"],
)
@torch.no_grad()
def test_each_row_is_computed_as_by_the_setting_of_the_model(options):
    model, ids = model_of(**options), tokens(batch=len(ROWS))
    thresholds, caps = torch.tensor([row[0] for row in ROWS]), torch.tensor([row[1] for row in ROWS])
    together = model(ids, gate_threshold=thresholds, max_experts=caps)
    gates = [routing.gate_TE.unflatten(0, ids.shape) for routing in together.routings]
    counts = set()
    for i, (threshold, cap) in enumerate(ROWS):
        set_dial(model, threshold, cap)
        alone = model(ids[i : i + 1])
        set_dial(model, 0.0, None)
        for layer, routing in zip(gates, alone.routings, strict=True):
            torch.testing.assert_close(layer[i], routing.gate_TE)
            assert torch.equal(layer[i] != 0, routing.gate_TE != 0)
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=1e-4, atol=1e-5)
        counts.add(int(sum(routing.count_E.sum() for routing in alone.routings)))
        one = model(ids[i : i + 1], gate_threshold=threshold, max_experts=cap)
        assert torch.equal(one.logits, alone.logits)
    assert len(counts) > 1  # the rows differ in what they leave out


def test_generate_takes_the_dial_for_each_row_and_with_several_answers():
    model, ids = model_of(), tokens(batch=len(ROWS))
    thresholds, caps = torch.tensor([row[0] for row in ROWS]), torch.tensor([row[1] for row in ROWS])
    together = write(model, ids, gate_threshold=thresholds, max_experts=caps)
    several = write(model, ids, gate_threshold=thresholds, max_experts=caps, num_beams=2)
    unlimited = write(model, ids)
    for i, (threshold, cap) in enumerate(ROWS):
        set_dial(model, threshold, cap)
        alone, beams = write(model, ids[i : i + 1]), write(model, ids[i : i + 1], num_beams=2)
        set_dial(model, 0.0, None)
        assert torch.equal(together.sequences[i], alone.sequences[0])
        for ours, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[i], expected[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(several.sequences[i], beams.sequences[0])
    assert not torch.allclose(together.logits[0][2], unlimited.logits[0][2])  # the cap of one has an effect


def test_beams_take_one_number_as_a_tensor_and_a_list():
    model, ids = model_of(), tokens(batch=2)
    for value, expected in ((torch.tensor(1), 1), ([1, 1], 1)):
        found = write(model, ids, max_experts=value, num_beams=2)
        assert torch.equal(found.logits[0], write(model, ids, max_experts=expected, num_beams=2).logits[0])
    assert not torch.equal(found.logits[0], write(model, ids, num_beams=2).logits[0])


@torch.no_grad()
def test_the_path_of_few_tokens_takes_the_dial(monkeypatch):
    used = []
    monkeypatch.setattr("remoe.decoding.few_tokens", lambda *a: used.append(few_tokens(*a)) or used[-1])
    model = model_of()
    layer, x = model.model.layers[0].mlp, torch.randn(len(ROWS), 1, model.config.hidden_size)
    given = {
        "gate_threshold": torch.tensor([row[:1] for row in ROWS]),
        "max_experts": torch.tensor([row[1:] for row in ROWS]),
    }
    y, routing = layer(x, **given)
    monkeypatch.setattr("remoe.layer.decode", lambda *a: None)
    expected, usual = layer(x, **given)
    if used == [None]:
        pytest.skip("no kernel for few tokens on this machine")
    assert len(used) == 1
    assert torch.equal(y, expected)
    assert torch.equal(routing.gate_TE, usual.gate_TE)
    assert torch.equal(routing.count_E, usual.count_E)


def test_the_text_of_sampling_options_has_the_dial():
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, 30)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<end>")), eos_token="<end>")
    model, counts = model_of(), []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: counts.append(int((output[1].gate_TE != 0).sum(dim=1).max()))
    )
    generate_text(model, tokenizer, "w1", SamplingOptions(max_new_tokens=4))
    assert max(counts) > 1
    counts.clear()
    generate_text(model, tokenizer, "w1", SamplingOptions(max_new_tokens=4, max_experts=1))
    assert max(counts) == 1
    counts.clear()
    generate_text(model, tokenizer, "w1", SamplingOptions(max_new_tokens=4, gate_threshold=1e6))
    assert max(counts) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate_threshold": -0.1}, "gate_threshold must be at least 0"),
        ({"gate_threshold": float("nan")}, "gate_threshold must be at least 0"),
        ({"max_experts": 0}, "max_experts must be at least 1"),
        ({"max_experts": torch.tensor([1, 0])}, "max_experts must be at least 1"),
        ({"max_experts": 1.5}, "max_experts must be whole numbers"),
        ({"max_experts": torch.tensor([1, 2, 3])}, "one number or 2"),
        ({"gate_threshold": torch.zeros(2, 1)}, "one number or 2"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        model_of()(tokens(batch=2), **given)


@pytest.mark.parametrize("router", [name for name, router in ROUTERS.items() if not router.routes_pairs])
def test_a_router_without_pairs_refuses_the_dial(router):
    with pytest.raises(ConfigError, match="routes no pairs"):
        model_of(router=router)(tokens(batch=2), max_experts=1)


@torch.no_grad()
def test_a_routing_read_later_is_that_of_the_values_that_were_given():
    model, ids = model_of(), tokens(batch=2)[:, :1]
    thresholds = torch.zeros(2)
    routings = model(ids, gate_threshold=thresholds).routings
    thresholds.fill_(100)
    assert routings[0].count_E.sum() > 0
