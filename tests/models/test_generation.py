"""What transformers asks of every model that writes: the contract of its common generation tests."""

import pytest
import torch
import transformers
from common_models import HEADS, LAYERS, VOCAB, WIDTH, build, tokens
from packaging import version
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, MixtralConfig, MixtralForCausalLM

import remoe
import remoe.decoding
from remoe.experts.cpu.build import compiled_kernels
from remoe.models.attention import CACHE_NAME

needs_kernels = pytest.mark.skipif(compiled_kernels(torch.float32) is None, reason="no compiled kernels here")
paged = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.24"),
    reason="before, transformers' paged cache was an argument of attention alone",
)

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
}


def write(model, ids, **options):
    torch.manual_seed(7)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


@pytest.mark.parametrize("way", WAYS)
def test_generation_is_the_same_with_every_cache(way):
    model, ids = build(), tokens(batch=2)
    without = write(model, ids, use_cache=False, **WAYS[way])
    assert without.shape == (2 * WAYS[way].get("num_return_sequences", 1), 15)
    for cache in ("dynamic", "static"):
        assert torch.equal(write(model, ids, cache_implementation=cache, **WAYS[way]), without), cache


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_of_a_left_padded_batch(way, cache):
    model, ids = build(), tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    together = write(model, ids * mask, attention_mask=mask, cache_implementation=cache, **WAYS[way])[:, 9:]
    assert torch.equal(together[0], write(model, ids[:1, 4:], **WAYS[way])[0, 5:])
    assert torch.equal(together[1], write(model, ids[1:], **WAYS[way])[0, 9:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_is_routed_to_no_expert_while_text_is_generated(cache):
    model, ids = build(), tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    counted, strides = [], []
    model.model.register_forward_pre_hook(
        lambda module, args, given: strides.append(given["token_mask"].stride(0)) if "token_mask" in given else None,
        with_kwargs=True,
    )
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: counted.append(output[1].num_tokens))
    write(model, ids * mask, attention_mask=mask, cache_implementation=cache, disable_compile=True)
    assert counted == [14, 2, 2, 2, 2, 2]
    assert strides == ([9, 1, 1, 1, 1, 1] if cache == "static" else [])  # one that grew would compile for each token


@pytest.mark.parametrize("cls", [remoe.RemoeForCausalLM, remoe.RemoeForSequenceClassification])
def test_a_token_mask_tells_padding_where_the_mask_of_attention_is_a_ready_one(cls):
    model, ids = build(cls, sparsity={"lambda_init": 0.3}).train(), tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    ready = (torch.ones(9, 9).tril().bool() & mask.bool()[:, None, None, :]) | torch.eye(9).bool()
    labels = ids if cls is remoe.RemoeForCausalLM else torch.tensor([0, 1])
    expected = model(ids, attention_mask=mask, labels=labels)
    outputs = model(ids, attention_mask=ready, token_mask=mask, labels=labels)
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_generation_goes_on_from_a_cache():
    model, ids = build(), tokens(batch=1)
    whole = write(model, ids, do_sample=False, max_new_tokens=8)
    half = write(model, ids, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    cache = half[CACHE_NAME]
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 12
    more = write(model, half.sequences, do_sample=False, max_new_tokens=4, **{CACHE_NAME: cache})
    assert torch.equal(more, whole)


def test_generation_from_embeddings():
    model, ids = build(), tokens(batch=2)
    written = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(written, write(model, ids, do_sample=False)[:, 9:])


def test_generation_assisted_by_a_smaller_model():
    model, helper, ids = build(), build(num_hidden_layers=1), tokens(batch=1)
    plain = write(model, ids, do_sample=False)
    assert torch.equal(write(model, ids, do_sample=False, assistant_model=helper), plain)
    assert torch.equal(write(model, ids, do_sample=False, prompt_lookup_num_tokens=2), plain)


def test_generation_returns_what_is_asked_for():
    model, ids = build(attn_implementation="eager"), tokens(batch=2)
    asked = ("output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate")
    outputs = write(model, ids, do_sample=False, **dict.fromkeys(asked, True))
    for part in (outputs.scores, outputs.logits, outputs.hidden_states, outputs.attentions):
        assert len(part) == 6
    assert outputs.hidden_states[1][0].shape == (2, 1, WIDTH)
    assert outputs.attentions[1][0].shape == (2, HEADS, 1, 10)


def test_generation_stops_at_the_end_and_config_is_saved(tmp_path):
    model, ids = build(), tokens(batch=1)
    end = write(model, ids, do_sample=False)[0, 10].item()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path)
    assert write(again, ids)[0, -1] == end
    assert write(again, ids).shape[1] <= 11


@pytest.fixture
def few(monkeypatch):
    """The number of tokens in each call of the experts' kernel for a few tokens that gave an output."""
    found, kernel = [], remoe.decoding.few_tokens

    def noted(x_TD, *args):
        y_TD = kernel(x_TD, *args)
        if y_TD is not None:
            found.append(len(x_TD))
        return y_TD

    monkeypatch.setattr(remoe.decoding, "few_tokens", noted)
    return found


@needs_kernels
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{"router": "relu"}, {"router": "topk"}, {"shared_expert_size": 16}], ids=str)
def test_text_is_written_by_the_kernel_for_a_few_tokens(cache, options, few, monkeypatch):
    model, ids = build(**options), tokens(batch=2)
    written = write(model, ids, do_sample=False, cache_implementation=cache)
    assert few == LAYERS * [18] + 5 * LAYERS * [2]
    monkeypatch.setattr(remoe.decoding, "MOST_TOKENS", -1)
    assert torch.equal(write(model, ids, do_sample=False, cache_implementation=cache), written)
    assert len(few) == 6 * LAYERS


@paged
@pytest.mark.parametrize("options", [{}, {"router": "topk"}, {"max_experts": 1}], ids=str)
def test_continuous_batching_writes_the_tokens_of_generate(options):
    model, (long,) = build(**options), tokens(batch=1, length=40)
    prompts = [long[:length].tolist() for length in (1, 40, 3, 17, 9)]  # of 40 tokens, longer than a forward pass
    fixed = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    expected = [write(model, torch.tensor([ids]), **fixed)[0, len(ids) :].tolist() for ids in prompts]
    assert len(set(map(tuple, expected))) > 2
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    outputs = model.generate_batch(prompts, GenerationConfig(pad_token_id=0, **fixed), room, progress_bar=False)
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [found[tuple(ids)] for ids in prompts] == expected


@needs_kernels
@paged
def test_continuous_batching_writes_by_the_kernel_for_a_few_tokens(few):
    model, ids = build(shared_expert_size=16), tokens(batch=3)
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [write(model, row[None], do_sample=False, max_new_tokens=4)[0, 9:].tolist() for row in ids]
    few.clear()
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(ids.tolist(), options, room, progress_bar=False)
    assert sorted(output.generated_tokens for output in outputs.values()) == sorted(expected)
    assert few


@needs_kernels
def test_a_relufied_model_writes_by_the_kernel_for_a_few_tokens(few, monkeypatch):
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, initializer_range=0.2)).eval()
    remoe.relufy(model, [tokens()], max_loss_increase=None)
    ids = tokens(batch=2)
    few.clear()
    written = write(model, ids, do_sample=False, eos_token_id=None)
    assert few == 2 * [18] + 5 * 2 * [2]
    monkeypatch.setattr(remoe.decoding, "MOST_TOKENS", -1)
    assert torch.equal(write(model, ids, do_sample=False, eos_token_id=None), written)
