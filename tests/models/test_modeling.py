"""The language model: loss and its parts, padding, accumulation, recomputation, cache, dtype, saving."""

import pytest
import torch
from torch import nn

import remoe
from remoe.errors import ConfigError
from remoe.models.attention import CACHE_NAME
from remoe.sparsity import FAST_START_PENALTY

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}


def small(**options):
    torch.manual_seed(0)
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**{**SMALL, **options})).train()


def tokens(batch=4, length=21, seed=1):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_relu_loss_is_language_model_plus_lambda_times_regulariser(normalization):
    model = small(sparsity={"lambda_init": 0.3}, regularizer_normalization=normalization)
    ids = tokens()
    out = model(ids, labels=ids, return_logits=True)
    layers = torch.stack([routing.regularizer for routing in out.routings])
    expected = layers.mean() if normalization == "paper" else layers.sum()
    torch.testing.assert_close(out.reg_loss, expected)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.3 * expected)
    nats = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.lm_loss, nats)


def test_topk_sums_its_switch_loss_and_dense_has_none():
    ids = tokens()
    out = small(router="topk", router_aux_loss_coef=0.5)(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.5 * sum(routing.regularizer for routing in out.routings))
    out = small(router="dense")(ids, labels=ids)
    assert out.loss == out.lm_loss


@pytest.mark.parametrize("router", ["relu", "relu_norm", "topk", "sparsemixer", "dense"])
@pytest.mark.parametrize("logits", [True, False])
def test_loss_in_evaluation_mode_is_the_tasks_alone(router, logits):
    options = {"locality": 1.0} if router == "relu_norm" else None
    model = small(router=router, router_options=options, sparsity={"lambda_init": 0.3}, router_aux_loss_coef=0.5)
    ids = tokens()
    expected = torch.nn.functional.cross_entropy(model.eval()(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for items in (None, 3):
        out = model(ids, labels=ids, return_logits=logits, num_items_in_batch=items)
        torch.testing.assert_close(out.loss, expected if items is None else expected * ids[:, 1:].numel() / items)
        assert out.loss == out.lm_loss
        assert out.reg_loss > 0 or router == "dense"


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
def test_every_parameter_gets_a_gradient(router):
    model = small(router=router)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_a_batch_with_no_active_expert_trains_on():
    model = small()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight.zero_()
    ids = tokens()
    out = model(ids, labels=ids)
    out.loss.backward()
    model.sparsity.update()
    assert model.sparsity.sparsity == 1
    assert torch.isfinite(out.loss)
    for layer in model.model.layers:
        assert not layer.mlp.experts.down_proj.grad.any()
        assert not layer.mlp.router.weight.grad.any()


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("logits", [True, False])
def test_padding_changes_no_logit_no_loss_and_no_statistic(router, side, logits):
    model = small(router=router, sparsity={"lambda_init": 0.3})
    ids = tokens(batch=1, length=13)
    alone = model(ids, labels=ids, return_logits=logits)
    model.sparsity.update()
    sparsity = model.sparsity.sparsity.clone()
    pad = torch.full((1, 6), 3)
    parts = (pad, ids) if side == "left" else (ids, pad)
    padded = torch.cat(parts, dim=1)
    mask = torch.cat([torch.zeros_like(part) if part is pad else torch.ones_like(part) for part in parts], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions, labels=padded, return_logits=logits)
    model.sparsity.update()
    if logits:
        torch.testing.assert_close(out.logits[mask.bool()], alone.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.reg_loss, alone.reg_loss)
    torch.testing.assert_close(out.lm_loss, alone.lm_loss)
    assert model.sparsity.sparsity == sparsity


def test_a_batch_of_padding_only_has_zero_loss():
    model = small(sparsity={"lambda_init": 0.3})
    ids = tokens()
    out = model(ids, attention_mask=torch.zeros_like(ids), labels=ids)
    assert out.loss == 0
    out.loss.backward()
    assert not any(p.grad is not None and p.grad.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("router", ["relu", "dense"])
def test_four_micro_batches_equal_one_batch_where_the_formula_is_additive(router):
    """Plain L1 (Eq. 9) and cross-entropy are sums over tokens; the balanced L1 is not (its f is per micro-batch)."""
    model = small(
        router=router,
        router_options={"load_balance": False} if router == "relu" else None,
        sparsity={"lambda_init": 0.3},
    )
    ids = tokens(batch=8)
    whole = model(ids, labels=ids)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    items = 8 * 20
    loss = 0.0
    for micro in ids.split(2):
        out = model(micro, labels=micro, num_items_in_batch=items)
        out.loss.backward()
        loss += out.loss.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_micro_batches_with_unequal_padding_add_up():
    model = small(router_options={"load_balance": False}, sparsity={"lambda_init": 0.3})
    ids = tokens(batch=4)
    mask = (torch.arange(21) < torch.tensor([[21], [5], [13], [2]])).long()
    whole = model(ids, attention_mask=mask, labels=ids)
    items, count = (mask[:, 1:]).sum(), mask.sum()
    loss = sum(
        model(
            ids[i : i + 1], attention_mask=mask[i : i + 1], labels=ids[i : i + 1],
            num_items_in_batch=items, num_tokens_in_batch=count,
        ).loss.item()
        for i in range(4)
    )  # fmt: skip
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)


def test_balanced_penalty_of_micro_batches_differs_from_the_batch_and_statistics_do_not():
    model = small(sparsity={"lambda_init": 0.3})
    ids = tokens(batch=8)
    whole = model(ids, labels=ids)
    model.sparsity.update()
    sparsity = model.sparsity.sparsity.item()
    parts = [model(micro, labels=micro, num_items_in_batch=8 * 20) for micro in ids.split(2)]
    model.sparsity.update()
    assert model.sparsity.sparsity.item() == sparsity
    assert sum(part.lm_loss.item() for part in parts) == pytest.approx(whole.lm_loss.item(), rel=1e-5)
    assert sum(part.reg_loss.item() for part in parts) != pytest.approx(whole.reg_loss.item(), rel=1e-6)


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_recomputation_gives_the_same_gradients_and_counts_once(router):
    from remoe.lab.training.build import enable_recomputation

    model = small(router=router, sparsity={"lambda_init": 0.3})
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    expected, counted = gradients(model), model.sparsity._tokens_L.clone()
    model.zero_grad()
    model.sparsity._tokens_L.zero_()
    enable_recomputation(model)
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.sparsity._tokens_L, counted)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_evaluation_counts_nothing():
    model = small().eval()
    model(tokens())
    assert not model.sparsity._tokens_L.any()


def test_cache_and_full_forward_agree():
    model = small().eval()
    ids = tokens(batch=2, length=12)
    full = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    logits, cache = [first.logits], first[CACHE_NAME]
    for i in range(5, 12):
        out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=1e-4, atol=1e-5)


def test_generate_with_left_padding_equals_each_prompt_alone():
    model = small().eval()
    prompts = [tokens(1, 9, seed=2)[0], tokens(1, 4, seed=3)[0]]
    padded = torch.full((2, 9), 0)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 9 - len(prompt) :] = prompt
        mask[row, 9 - len(prompt) :] = 1
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **options)[:, 9:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
        assert torch.equal(together[row], alone[0, len(prompt) :])


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
def test_causal(router):
    model = small(router=router).eval()
    ids = tokens(batch=1, length=15)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_saved_and_loaded_without_pickle(tmp_path):
    model = small(sparsity={"lambda_init": 0.123})
    ids = tokens()
    model(ids, labels=ids)
    model.sparsity.update()
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}
    for dtype in (torch.float32, torch.bfloat16):
        again = remoe.RemoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert again.dtype == dtype
        assert again.sparsity.lam.dtype == torch.float32
        assert torch.equal(again.sparsity.lam, model.sparsity.lam)
    assert again.config.to_dict()["num_experts"] == 5
    full = remoe.RemoeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(full.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_starts_with_clean_statistics(tmp_path, dtype):
    """Buffers that are not saved come back from loading as undefined memory, which this setting fills with NaN."""
    model = small(sparsity={"fast_start": True}).to(dtype)
    model.save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)
    try:
        again = remoe.RemoeForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    finally:
        torch.use_deterministic_algorithms(False)
    ids = tokens()
    for either in (model, again):
        either(ids, labels=ids)
        either.sparsity.update()
    assert again.sparsity.load_LE.dtype == torch.float32
    for name in ("sparsity", "lam", "load_LE"):
        assert torch.equal(getattr(again.sparsity, name), getattr(model.sparsity, name))


ROPES = [
    None,
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("cls", [remoe.RemoeModel, remoe.RemoeForCausalLM, remoe.RemoeForSequenceClassification])
def test_rotary_frequencies_stay_float32(cls, rope, tmp_path):
    config = remoe.RemoeConfig(**SMALL, rope_parameters=rope)
    plain = cls(config)
    expected = plain.base_model.rotary_emb.inv_freq.clone()
    plain.save_pretrained(tmp_path)
    casts = {
        "to": lambda model: model.to(torch.bfloat16),
        "to others": lambda model: model.to(plain.base_model.norm.weight.half()),
        "half": lambda model: model.half(),
        "bfloat16": lambda model: model.bfloat16(),
        "back": lambda model: model.bfloat16().float(),
        "within": lambda model: nn.Sequential(model).bfloat16()[0],
        "loaded": lambda model: cls.from_pretrained(tmp_path, dtype=torch.bfloat16),
        "made": lambda model: cls._from_config(config, dtype=torch.bfloat16),
    }
    for name, cast in casts.items():
        model = cast(cls(config))
        assert name == "back" or model.dtype != torch.float32
        for buffer in model.base_model.rotary_emb.buffers():
            assert buffer.dtype == torch.float32, name
            assert torch.equal(buffer, expected), name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_reentrant_recomputation_is_refused():
    model = small()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        model(tokens())


@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_fast_start_sets_the_penalty_of_the_loss(normalization):
    model = small(sparsity={"fast_start": True}, regularizer_normalization=normalization)
    out = model(tokens(), labels=tokens())
    model.sparsity.update()
    assert (model.sparsity.lam * out.reg_loss).item() == pytest.approx(FAST_START_PENALTY, rel=1e-5)


def test_logits_to_keep():
    model = small().eval()
    ids = tokens()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])


def test_bfloat16_model_routes_in_float32():
    model = small().to(torch.bfloat16)
    ids = tokens()
    out = model(ids, labels=ids)
    assert model(ids).logits.dtype == torch.bfloat16
    assert out.lm_loss.dtype == torch.float32
    assert out.routings[0].logits_TE.dtype == torch.float32
    assert model.sparsity.lam.dtype == torch.float32
    out.loss.backward()


def test_sdpa_and_eager_attention_agree():
    ids = tokens()
    sdpa, eager = (small(attn_implementation=name).eval()(ids).logits for name in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts_per_tok": 9}, "k = 9 and E = 5"),
        ({"router": "softmax"}, "unknown router 'softmax'"),
        ({"num_attention_heads": 5}, "must divide the width"),
        ({"num_key_value_heads": 3}, "must divide the number of attention heads"),
        ({"granularity": 7}, "granularity must divide the expert width 128"),
        ({"sparsity": {"rule": "fast"}}, "unknown sparsity rule 'fast'"),
        ({"regularizer_normalization": "sum"}, "unknown regularizer_normalization 'sum'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        remoe.RemoeConfig(**{**SMALL, **options})
