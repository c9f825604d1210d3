"""Ids that no token has, where the vocabulary is rounded up: never sampled, and in no loss."""

import json

import pytest
import torch

import remoe
from remoe.errors import ConfigError
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.training.build import model_config
from remoe.lab.training.config import TrainConfig

KNOWN = 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}


def build(vocab_size=128, tokenizer_size=KNOWN, **options):
    torch.manual_seed(0)
    return remoe.RemoeForCausalLM(
        remoe.RemoeConfig(**SIZES | options, vocab_size=vocab_size, tokenizer_size=tokenizer_size)
    )


def without_the_rest(model, **options):
    """The same weights in a model whose vocabulary ends where the tokenizer's does."""
    small = build(KNOWN, None, **options)
    state = {k: v[:KNOWN] if k in ("lm_head.weight", "model.embed_tokens.weight") else v
             for k, v in model.state_dict().items()}  # fmt: skip
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("return_logits", [False, True])
def test_loss_and_gradients_are_those_of_the_smaller_vocabulary(tied, training, return_logits):
    model = build(tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight[KNOWN:] *= 100  # they would win
    small = without_the_rest(model, tie_word_embeddings=tied)
    ids = torch.randint(KNOWN, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for one in (model.train(training), small.train(training)):
        out = one(ids, labels=ids, return_logits=return_logits)
        out.loss.backward()
        losses.append(out.loss)
    torch.testing.assert_close(*losses)
    found, expected = model.lm_head.weight.grad, small.lm_head.weight.grad
    torch.testing.assert_close(found[:KNOWN], expected)
    assert not found[KNOWN:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_such_ids_have_no_probability_and_entropies_stay_finite(dtype):
    model = build().to(dtype).eval()
    ids = torch.randint(KNOWN, (1, 5))
    for temperature in (0.01, 0.9, 100.0):
        scores = model(ids).logits.float() / temperature
        prob = scores.softmax(-1)
        assert prob[..., KNOWN:].sum() == 0
        assert (prob * scores.log_softmax(-1)).sum(-1).isfinite().all()
    options = {"do_sample": True, "temperature": 50.0, "top_k": 0, "pad_token_id": 0, "max_new_tokens": 40}
    assert model.generate(ids.repeat(8, 1), **options).max() < KNOWN


def test_resized_embeddings_have_only_tokens():
    model = build().eval()
    model.resize_token_embeddings(100)
    assert (model.config.vocab_size, model.config.tokenizer_size) == (100, 100)
    assert model(torch.zeros(1, 2, dtype=torch.int64)).logits.min() > -1e4
    model.resize_token_embeddings(101, pad_to_multiple_of=64)
    assert (model.config.vocab_size, model.config.tokenizer_size) == (128, 101)
    assert (model(torch.zeros(1, 2, dtype=torch.int64)).logits < -1e4).sum() == 2 * 27


def test_a_checkpoint_from_before_computes_the_same(tmp_path):
    old = build(tokenizer_size=None).eval()
    old.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("tokenizer_size", None)
    path.write_text(json.dumps(config))
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(128, (2, 9))
    assert torch.equal(again(ids).logits, old(ids).logits)
    assert again(ids, labels=ids).loss == old(ids, labels=ids).loss
    again.config.tokenizer_size = KNOWN
    again.save_pretrained(tmp_path)
    assert remoe.RemoeForCausalLM.from_pretrained(tmp_path).config.tokenizer_size == KNOWN


def test_a_run_knows_its_tokenizers_size():
    config = model_config(TrainConfig(), 384, eos_token_id=0)
    assert (config.vocab_size, config.tokenizer_size) == (1024, 384)


def test_text_of_a_model_that_does_not_know_it_has_only_tokens():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0} | {f"w{i}": i for i in range(1, KNOWN)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<end>")), eos_token="<end>")
    model = build(tokenizer_size=None)
    with torch.no_grad():
        model.lm_head.weight[KNOWN:] *= 100
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    for temperature in (0.0, 1.0):
        generate_text(model, tokenizer, "w1", SamplingOptions(max_new_tokens=20, temperature=temperature))
    assert len(seen) > 2
    assert max(ids.max() for ids in seen) < KNOWN


def test_a_size_beyond_the_vocabulary_is_named():
    for size in (0, 129):
        with pytest.raises(ConfigError, match="tokenizer_size must be between 1 and vocab_size = 128"):
            build(tokenizer_size=size)
