"""Small models of every class of ours, for the tests that transformers asks of all."""

import pytest
import torch

import remoe

CLASSES = [remoe.RemoeModel, remoe.RemoeForCausalLM, remoe.RemoeForSequenceClassification]
LAYERS, WIDTH, HEADS, VOCAB = 3, 32, 4, 99
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
every_class = pytest.mark.parametrize("cls", CLASSES)


def build(cls=remoe.RemoeForCausalLM, **options):
    torch.manual_seed(0)
    return cls(remoe.RemoeConfig(**(SIZES | options))).eval()


def tokens(batch=3, length=9, seed=1):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else next(iter(outputs.values()))


@torch.no_grad()
def run(model, ids=None, **options):
    return first(model(tokens() if ids is None else ids, **options))
