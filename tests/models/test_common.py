"""What transformers asks of every model, by the contract of its common model and generation tests."""

import inspect

import pytest
import torch
from common_models import HEADS, LAYERS, SIZES, VOCAB, WIDTH, build, every_class, first, run, tokens
from torch import nn

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


@every_class
def test_entries_of_outputs_are_tensors_with_a_row_for_each_input(cls):
    model, ids = build(cls), tokens()
    outputs = model(ids, use_cache=False, output_hidden_states=True)
    for name, entry in outputs.items():
        for tensor in entry if isinstance(entry, tuple) else (entry,):
            assert len(tensor) == len(ids), name
    assert [routing.gate_TE.shape[0] for routing in outputs.routings] == [ids.numel()] * LAYERS
    assert len(outputs.to_tuple()) == len(model(ids, use_cache=False, output_hidden_states=True, return_dict=False))
    assert len(model.train()(ids)["routings"]) == LAYERS


@every_class
def test_both_names_of_the_cache_are_taken(cls):
    from transformers import DynamicCache

    model, ids = build(cls), tokens()
    expected = run(model, ids)
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        run(model, ids[:, :-2], **{name: cache})
        found = run(model, ids[:, -2:], **{name: cache})
        torch.testing.assert_close(found[:, -1] if found.ndim == 3 else found,
                                   expected[:, -1] if expected.ndim == 3 else expected)  # fmt: skip


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction", "text-generation"])
def test_pipelines_take_batches(task):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, VOCAB)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
    cls = {"text-classification": remoe.RemoeForSequenceClassification, "feature-extraction": remoe.RemoeModel}
    model = build(cls.get(task, remoe.RemoeForCausalLM), num_hidden_layers=1)
    options = {"max_new_tokens": 2, "do_sample": False} if task == "text-generation" else {}
    call = pipeline(task, model=model, tokenizer=tokenizer)
    texts = ["w4", "w7", "w9"]  # of one length: features of padding are returned too
    found, expected = call(texts, batch_size=2, **options), [call([text], **options)[0] for text in texts]
    if task == "text-classification":
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        found, expected = ([one["score"] for one in some] for some in (found, expected))
    if task == "text-generation":
        assert found == expected
    else:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


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


def test_a_smaller_vocabulary_is_made_anew_when_allowed(tmp_path):
    build(tokenizer_size=VOCAB - 1).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        remoe.RemoeForCausalLM.from_pretrained(tmp_path, vocab_size=10)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path, vocab_size=10, ignore_mismatched_sizes=True)
    assert again.config.tokenizer_size is None
    assert run(again, tokens() % 10).shape == (3, 9, 10)


@every_class
@pytest.mark.parametrize("router", ["relu", "sigmoid", "threshold"])
def test_what_stays_float32_is_there(cls, router):
    model = build(cls, router=router)
    names = [name for name, _ in model.named_buffers()]
    kept = model._keep_in_fp32_modules_strict
    assert all(any(part in name.split(".") for name in names) for part in kept)
    assert ("sparsity" in kept) == (cls is not remoe.RemoeModel)
    assert kept & {"bias_E", "cutoff_E"} == {"sigmoid": {"bias_E"}, "threshold": {"cutoff_E"}}.get(router, set())


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
