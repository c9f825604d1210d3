"""What transformers asks of every model, by the contract of its common model and generation tests."""

import inspect

import pytest
import torch
from common_models import HEADS, LAYERS, SIZES, VOCAB, WIDTH, build, every_class, first, run, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline
from transformers.cache_utils import Cache

import remoe
from remoe.errors import ConfigError

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
def test_outputs_for_inference_hold_tensors_and_the_cache_alone(cls):
    model, ids = build(cls), tokens()
    labels = {} if cls is remoe.RemoeModel else {"labels": ids if cls is remoe.RemoeForCausalLM else ids[:, 0] % 2}
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, **labels)
    values = [value for item in outputs.to_tuple() for value in (item if isinstance(item, tuple) else (item,))]
    assert all(isinstance(value, torch.Tensor | Cache) for value in values)
    assert len(outputs.routings) == LAYERS
    assert {"routings"} <= set(model.train()(ids, **labels))


def tokenizer_of_letters():
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@every_class
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pipelines_take_batches(cls, batch_size):
    task, options = {
        remoe.RemoeModel: ("feature-extraction", {}),
        remoe.RemoeForCausalLM: ("text-generation", {"max_new_tokens": 2, "do_sample": False}),
        remoe.RemoeForSequenceClassification: ("text-classification", {}),
    }[cls]
    model = build(cls, pad_token_id=0, num_hidden_layers=1)
    run_pipeline = pipeline(task, model=model, tokenizer=tokenizer_of_letters())
    texts = ["a b c", "d e f", "g h a", "b b b"]
    for alone, together in zip(texts, run_pipeline(texts, batch_size=batch_size, **options), strict=True):
        expected = run_pipeline(alone, **options)
        if task == "feature-extraction":
            torch.testing.assert_close(torch.tensor(together), torch.tensor(expected), rtol=1e-4, atol=1e-5)
        elif task == "text-generation":
            assert together == expected
        else:
            assert together["label"] == expected[0]["label"]
            assert together["score"] == pytest.approx(expected[0]["score"], rel=1e-4)


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


def test_left_padding_with_attentions_returned_changes_nothing():
    model, ids = build(attn_implementation="eager"), tokens()
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[:, :4] = 0
    padded = torch.cat((ids.new_zeros(3, 4), ids), dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    outputs = model(padded, attention_mask=mask, position_ids=positions, output_attentions=True)
    torch.testing.assert_close(outputs.logits[:, 4:], model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(weights.isnan().any() for weights in outputs.attentions)


def test_the_cache_has_its_older_name_too():
    model, ids = build(), tokens()
    expected = model(ids).logits[:, -1:]
    before = model(ids[:, :-1], use_cache=True)
    assert before.past_key_values is before["past_key_values"]
    torch.testing.assert_close(
        model(ids[:, -1:], past_key_values=before.past_key_values).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_weights_of_another_shape_are_replaced_only_on_request(tmp_path):
    build(remoe.RemoeForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    load, ids = AutoModelForSequenceClassification.from_pretrained, tokens()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, num_labels=42)
    model = load(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
    assert model(ids[:1]).logits.shape == (1, 42)
    base = AutoModel.from_pretrained(tmp_path, vocab_size=10, ignore_mismatched_sizes=True)
    assert base(ids % 10).last_hidden_state.isfinite().all()


def test_a_smaller_vocabulary_is_made_anew_when_allowed(tmp_path):
    build(tokenizer_size=VOCAB - 1).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        remoe.RemoeForCausalLM.from_pretrained(tmp_path, vocab_size=10)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path, vocab_size=10, ignore_mismatched_sizes=True)
    assert again.config.tokenizer_size is None
    assert run(again, tokens() % 10).shape == (3, 9, 10)


@every_class
@pytest.mark.parametrize("router", ["relu", "sigmoid", "threshold"])
def test_what_is_kept_in_float32_is_in_the_model(cls, router):
    model = build(cls, router=router)
    names = {part for name, _ in model.named_buffers() for part in name.split(".")}
    kept = {"relu": set(), "sigmoid": {"bias_E"}, "threshold": {"cutoff_E"}}[router]
    kept |= set() if cls is remoe.RemoeModel else {"sparsity"}
    assert model._keep_in_fp32_modules_strict == kept <= names


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


@pytest.fixture
def uncompiled():
    """flex_attention without Inductor: what it computes is tested, not how fast."""
    with torch.compiler.set_stance("force_eager"):
        yield


@every_class
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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
