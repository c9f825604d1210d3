"""What cannot be spread over ranks is refused, before anything is communicated."""

import pytest
import torch
import transformers
from packaging import version
from transformers import MixtralConfig, MixtralForCausalLM

import remoe
from remoe.errors import ConfigError
from remoe.models.sharding import shard

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")
SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def own(**options):
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, num_experts=4, **options))


def of_transformers():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


@pytest.mark.parametrize(
    ("make", "mesh", "words"),
    [
        (of_transformers, {"fsdp": 2, "ep": 2}, "a MixtralForCausalLM can be spread by fsdp and replicate alone"),
        (lambda: own(tie_word_embeddings=True), {"fsdp": 2}, "whose embeddings are those of its head"),
        (lambda: own().double(), {"fsdp": 2, "ep": 2}, "needs float32 or bfloat16 weights, not torch.float64"),
    ],
    ids=["experts without an exchange", "tied embeddings", "float64"],
)
def test_what_cannot_be_spread_is_refused(make, mesh, words):
    with pytest.raises(ConfigError, match=words):
        shard(make(), torch.device("cpu"), **mesh)
