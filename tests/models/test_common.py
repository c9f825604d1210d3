"""What transformers asks of every model, by the contract of its common model and generation tests."""

import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

import remoe
from remoe.errors import ConfigError
from remoe.models.modeling_remoe import CACHE_NAME

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


# --- forward ----------------------------------------------------------------------------------------------------------


@every_class
def test_forward_signature_starts_with_input_ids(cls):
    assert list(inspect.signature(cls.forward).parameters)[1:3] == ["input_ids", "attention_mask"]


@every_class
def test_two_runs_are_equal(cls):
    model = build(cls)
    assert torch.equal(run(model), run(model))


@every_class
def test_tuple_and_dict_agree(cls):
    model, ids = build(cls), tokens()
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        values = model(ids, output_hidden_states=True, return_dict=False)
        model.config.return_dict = False
        by_config = model(ids, output_hidden_states=True)
    assert isinstance(values, tuple)
    assert isinstance(by_config, tuple)
    assert len(values) == len(outputs.to_tuple())
    assert torch.equal(values[0], first(outputs))
    assert torch.equal(by_config[0], first(outputs))


@every_class
def test_hidden_states_of_every_layer(cls):
    model = build(cls)
    states = model(tokens(), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 9, WIDTH)] * (LAYERS + 1)
    model.config.output_hidden_states = True
    assert len(model(tokens()).hidden_states) == LAYERS + 1


@every_class
def test_attentions_of_every_layer(cls):
    model = build(cls, attn_implementation="eager")
    weights = model(tokens(), output_attentions=True).attentions
    assert [tuple(weight.shape) for weight in weights] == [(3, HEADS, 9, 9)] * LAYERS
    torch.testing.assert_close(weights[0].sum(dim=-1), torch.ones(3, HEADS, 9))
    assert not weights[0].triu(1).any()


def test_attentions_of_an_attention_without_weights_are_refused():
    with pytest.raises(ConfigError, match="eager"):
        build(attn_implementation="sdpa")(tokens(), output_attentions=True)


@every_class
def test_gradients_of_hidden_states_and_attentions_are_kept(cls):
    model = build(cls, attn_implementation="eager").train()
    outputs = model(tokens(), output_hidden_states=True, output_attentions=True)
    kept = [outputs.hidden_states[0], outputs.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    first(outputs).flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in kept)


@every_class
def test_embeddings_instead_of_tokens(cls):
    model, ids = build(cls), tokens()
    embedded = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(run(model, ids), first(model(inputs_embeds=embedded, attention_mask=mask)))


@every_class
def test_a_row_of_a_batch_is_the_row_alone(cls):
    model, ids = build(cls), tokens()
    together = run(model, ids)
    for row in range(3):
        torch.testing.assert_close(run(model, ids[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-5)


@every_class
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree_with_eager(cls, implementation):
    options = {"head_dim": 16} if implementation == "flex_attention" else {}
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    eager, other = build(cls, attn_implementation="eager", **options), build(cls, **options)
    other.set_attn_implementation(implementation)
    seen = mask.bool() if cls is not remoe.RemoeForSequenceClassification else slice(None)
    torch.testing.assert_close(
        run(other, ids, attention_mask=mask)[seen], run(eager, ids, attention_mask=mask)[seen], rtol=1e-4, atol=1e-5
    )


def test_ready_masks_of_flex_attention_are_taken_as_such():
    from torch.nn.attention.flex_attention import create_block_mask

    ids, model = tokens(batch=2), build(head_dim=16).requires_grad_(False)
    expected = run(model, ids)
    model.set_attn_implementation("flex_attention")
    causal = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    outputs = model(ids, attention_mask=causal, labels=ids)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_gradient_checkpointing_on_and_off(cls):
    model = build(cls).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    gradients = []
    for _ in range(2):
        model.zero_grad()
        first(model(tokens())).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize(
    ("problem", "labels", "count"),
    [
        ("regression", torch.tensor([0.5, 1.0, -1.0]), 1),
        ("single_label_classification", torch.tensor([0, 2, 1]), 3),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0]] * 3), 3),
    ],
)
def test_problem_types_of_classification(problem, labels, count):
    model = build(remoe.RemoeForSequenceClassification, problem_type=problem, num_labels=count).train()
    loss = model(tokens(), labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.score.weight.grad.any()


# --- weights ----------------------------------------------------------------------------------------------------------


@every_class
def test_initialisation_has_the_configured_deviation(cls):
    model = build(cls, initializer_range=1e-9)
    for name, parameter in model.named_parameters():
        wanted = torch.full_like(parameter, 1.0 if "norm" in name else 0.0)
        torch.testing.assert_close(parameter, wanted, atol=1e-7, rtol=0, msg=name)


@every_class
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_saved_and_loaded_whole_and_in_shards(cls, shard, tmp_path):
    model = build(cls)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(run(again), run(model))


@every_class
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(cls, device_map, tmp_path):
    model = build(cls)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(cls.from_pretrained(tmp_path, device_map=device_map)), run(model))


@pytest.mark.parametrize("options", [{}, {"shared_expert_size": 16}, {"router": "dense"}, {"router": "lory"}])
def test_layers_offloaded_to_disk(options, tmp_path):
    model = build(**options)
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"sparsity": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    again = remoe.RemoeForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(run(again), run(model))


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loaded_in_another_dtype(cls, dtype, tmp_path):
    build(cls).save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}


def test_a_head_of_another_size_is_made_anew_when_allowed(tmp_path):
    model = build(remoe.RemoeForSequenceClassification)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        remoe.RemoeForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    again = remoe.RemoeForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert run(again).shape == (3, 7)
    assert torch.equal(again.model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)


def test_tied_embeddings_stay_tied(tmp_path):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCAB + 11, VOCAB - 9])
def test_embeddings_are_resized(tied, size):
    model, ids = build(tie_word_embeddings=tied), tokens() % (VOCAB - 10)
    before = run(model, ids)
    model.resize_token_embeddings(size, mean_resizing=False)
    after = run(model, ids)
    kept = min(size, VOCAB)
    assert model.config.vocab_size == after.shape[-1] == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model.train()(ids, labels=ids).loss.backward()


@every_class
def test_input_embeddings_are_replaced(cls):
    model = build(cls)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    new = nn.Embedding(10, WIDTH)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


def test_output_embeddings():
    model = build()
    new = nn.Linear(WIDTH, 7, bias=False)
    assert model.get_output_embeddings() is model.lm_head
    model.set_output_embeddings(new)
    assert run(model).shape[-1] == 7


def test_config_is_saved_and_read(tmp_path):
    config = remoe.RemoeConfig(**SIZES, router_options={"bias": True})
    config.save_pretrained(tmp_path)
    again = remoe.RemoeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert remoe.RemoeConfig.from_dict(config.to_dict()).to_diff_dict() == config.to_diff_dict()


# --- generation -------------------------------------------------------------------------------------------------------

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
    model, ids = build(cls, lambda_init=0.3).train(), tokens(batch=2)
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
