"""The routing of a text while a model writes it is what an independent pass over the whole text executes."""

import io
from pathlib import Path

import pytest
import tiny_models
import torch
from common_models import build as build_ours
from torch.nn import functional as F

import remoe
from remoe.errors import ConfigError
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.texts import Prompt
from remoe.lab.analysis.writing import write_text
from remoe.lab.data import load_tokenizer, open_dataset
from remoe.lab.generation import SamplingOptions, generate_text

PROMPT = "cow 2. 🐄 hen"
LENGTH = 12


def relufied(size):
    model = tiny_models.build("mixtral", vocab_size=size)
    remoe.relufy(model, [tiny_models.token_ids(2)], max_loss_increase=None)
    return model


def without_a_cache(size):
    model = build_ours(vocab_size=size)
    model.generation_config.use_cache = False
    return model


MODELS = {
    "relu": lambda size: build_ours(vocab_size=size),
    "topk": lambda size: build_ours(vocab_size=size, router="topk"),
    "without-a-cache": without_a_cache,
    "relufied": relufied,
    "mixtral": lambda size: tiny_models.build("mixtral", vocab_size=size),
}


def source_of(name, corpus):
    model, tokenizer = MODELS[name](open_dataset(corpus).vocab_size), load_tokenizer(corpus / "tokenizer")
    text = Prompt(PROMPT, tokenizer, 64, special=False)
    return Source(model, Mixture(model), tokenizer, Path("model"), None, text, None)


@pytest.mark.parametrize("name", MODELS)
def test_pairs_gates_and_losses_are_those_of_a_pass_over_the_whole_text(name, corpus):
    source, options = source_of(name, corpus), SamplingOptions(max_new_tokens=LENGTH, temperature=5.0, top_k=0)
    read, written = write_text(source, PROMPT, options)
    ids, prompt = written.token_T, source.tokenizer(PROMPT)["input_ids"]
    assert ids[: written.prompt].tolist() == prompt
    assert len(ids) == len(prompt) + LENGTH
    said = generate_text(source.model, source.tokenizer, PROMPT, options)
    assert "".join(written.texts) == PROMPT + said
    with torch.no_grad():
        logits_1SV, layers = source.mixture.run(ids[None, :-1])
    nats_S = F.cross_entropy(logits_1SV[0], ids[1:], reduction="none")
    assert written.nats_T[0].isnan()
    torch.testing.assert_close(written.nats_T[1:], nats_S, rtol=1e-4, atol=1e-4)
    expected_LTE = torch.stack([one.active_TE for one in layers])
    assert torch.equal(written.active_LTE, expected_LTE)
    assert 0 < written.active_LTE.float().mean() < 1
    torch.testing.assert_close(written.gate_LTE, torch.stack([one.gate_TE for one in layers]), rtol=1e-4, atol=1e-5)
    block = written.record(source, io.BytesIO()).whole(gates=True, texts=True)
    assert torch.equal(block.active_LTE, expected_LTE)
    assert torch.equal(block.loss_T, written.nats_T[1:])
    assert block.texts == written.texts[:-1]
    (batch,) = read.text.batches(8)
    assert torch.equal(batch.input_NS, ids[None, :-1])


def test_the_dial_of_a_generation_is_recorded(corpus):
    source = source_of("relu", corpus)
    _, free = write_text(source, PROMPT, SamplingOptions(max_new_tokens=4))
    _, capped = write_text(source, PROMPT, SamplingOptions(max_new_tokens=4, max_experts=1))
    assert free.active_LTE.sum(dim=2).max() > 1
    assert capped.active_LTE.sum(dim=2).max() == 1
    first_LE = capped.active_LTE[:, 0] & ~free.active_LTE[:, 0]
    assert not first_LE[0].any()  # of the first layer, whose input is the same, some of the same pairs
    assert capped.identity["sampling"]["max_experts"] == 1


def test_nothing_listens_afterwards_and_a_model_without_routing_says_so(corpus):
    source = source_of("relu", corpus)
    write_text(source, PROMPT, SamplingOptions(max_new_tokens=1))
    assert not source.model._forward_hooks
    dense = build_ours(router="dense")
    with pytest.raises(ConfigError, match="router 'dense' does not send single tokens to experts"):
        write_text(Source(dense, None, source.tokenizer, Path(), None, source.text, None), "a", SamplingOptions())
