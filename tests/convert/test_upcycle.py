"""upcycle: the same logits for every architecture, E and G; experts that differ; open gates; what is refused."""

import pytest
import torch
from tiny_models import DENSE, build, token_ids

import remoe
from remoe.errors import ConfigError


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("num_experts", "k", "granularity"), [(2, 1, 1), (3, 1, 1), (4, 1, 2), (5, 2, 3), (8, 2, 4)])
@pytest.mark.parametrize("name", DENSE)
def test_copies_have_the_dense_models_logits(name, num_experts, k, granularity):
    dense, ids = build(name), token_ids(4)
    model = remoe.upcycle(dense, num_experts, k, granularity, keep_dense=False)
    with torch.no_grad():
        outputs = model(ids)
        assert relative_error(outputs.logits, dense(ids).logits) < 1e-5
    assert all(routing.sparsity == 0 for routing in outputs.routings)
    assert model.sparsity.target == pytest.approx(1 - k / num_experts)


@pytest.mark.parametrize("keep_dense", [True, False])
def test_llama_with_biases_scaled_positions_and_tied_embeddings(keep_dense):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    dense = build("llama", attention_bias=True, rope_parameters=rope, tie_word_embeddings=True)
    model, ids = remoe.upcycle(dense, 4, keep_dense=keep_dense), token_ids(4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert relative_error(model(ids).logits, dense(ids).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_exact_in_16_bits(dtype):
    exact = build("llama").model.rotary_emb.inv_freq
    model = remoe.upcycle(build("llama").to(dtype), 4)
    assert model.dtype == dtype
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_one_token_is_no_sample():
    ids = token_ids(1)
    for samples in ([ids[:, :1]], [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}]):
        with pytest.raises(ConfigError, match="two tokens at least"):
            remoe.upcycle(build("llama"), 4, samples=samples)


@pytest.mark.parametrize("num_experts", [2, 3, 4, 7])
def test_experts_differ_and_the_differences_cancel(num_experts):
    dense = build("llama")
    model = remoe.upcycle(dense, num_experts, diversity=0.1, keep_dense=False)
    down_EDF = model.model.layers[0].mlp.experts.down_proj.detach()
    dense_DF = dense.model.layers[0].mlp.down_proj.weight.detach()
    torch.testing.assert_close(down_EDF.mean(dim=0), dense_DF)
    spread = ((down_EDF - dense_DF).square().mean().sqrt() / dense_DF.std()).item()
    assert spread == pytest.approx(0.1 if num_experts > 2 else 0.0, rel=0.2)
    weight_ED = model.model.layers[0].mlp.router.weight.detach()
    torch.testing.assert_close(weight_ED.sum(dim=0), torch.zeros(32), atol=1e-6, rtol=0)
    assert weight_ED.abs().max() > 0


def test_no_input_closes_a_gate():
    dense = build("llama")
    model = remoe.upcycle(dense, 4, keep_dense=False)
    router = model.model.layers[0].mlp.router
    norm = dense.model.layers[0].post_attention_layernorm
    scaled_D = norm.weight.detach()
    worst_ED = router.weight.detach() * scaled_D.square()  # norm(x) is then along w * norm^2
    direction_ED = worst_ED / scaled_D
    for sign in (1, -1):
        with torch.no_grad():
            gate_EE = router(norm(sign * direction_ED * 1e3)).gate_TE
        assert gate_EE.min() >= 0.5 / 4 - 1e-6


def test_noise_breaks_equality_only_when_asked():
    dense, ids = build("llama"), token_ids(2)
    with torch.no_grad():
        noisy = relative_error(remoe.upcycle(dense, 4, noise=0.05, keep_dense=False)(ids).logits, dense(ids).logits)
    assert 1e-4 < noisy < 0.5


def test_same_seed_same_model():
    dense = build("llama")
    first, second, other = (remoe.upcycle(dense, 4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.router.weight"], other["model.layers.0.mlp.router.weight"])


def test_copies_train_and_are_saved(tmp_path):
    model, ids = remoe.upcycle(build("qwen3"), 4, keep_dense=False).train(), token_ids(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_routing()
    router = model.model.layers[0].mlp.router
    assert router.weight.detach().std() > 0
    model.eval().save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_options_reach_the_config():
    options = {"router_options": {"load_balance": False}, "sparsity": {"rule": "sign"}}
    config = remoe.upcycle(build("llama"), 4, **options).config
    assert config.router_options == {"load_balance": False, "bias": True}
    assert (config.sparsity["rule"], config.sparsity["fast_start"]) == ("sign", True)
    with pytest.raises(ConfigError, match="no lamda"):
        remoe.upcycle(build("llama"), 4, lamda=1)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("mixtral", (4,), "MixtralForCausalLM is 'mixtral'"),
        ("llama", (1,), "at least 2 experts"),
        ("llama", (4, 5), "k must be between"),
        ("llama", (4, 1, 5), "granularity must divide"),
    ],
)
def test_unsupported_input_is_one_clear_error(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        remoe.upcycle(build(model), *arguments)


def test_bias_of_the_feed_forward_layer_is_refused():
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.gate_proj has a bias"):
        remoe.upcycle(build("llama", mlp_bias=True), 4)


@pytest.mark.parametrize(("num_experts", "k", "granularity"), [(2, 1, 1), (4, 1, 2), (8, 2, 4), (3, 3, 1)])
@pytest.mark.parametrize("name", DENSE)
def test_kept_dense_layer_with_sparse_experts_has_the_same_logits(name, num_experts, k, granularity):
    dense, ids = build(name), token_ids(8)
    model = remoe.upcycle(dense, num_experts, k, granularity, noise=0.1)
    with torch.no_grad():
        outputs = model(ids)
        assert relative_error(outputs.logits, dense(ids).logits) < 1e-5
    sparsity = torch.stack([routing.sparsity for routing in outputs.routings]).mean().item()
    assert sparsity == pytest.approx(1 - k / num_experts, abs=0.15)
    assert model.config.shared_expert_size == dense.config.intermediate_size


def test_experts_beside_a_kept_dense_layer_learn(tmp_path):
    dense, ids = build("llama"), token_ids(8)
    model = remoe.upcycle(dense, 4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        out = model(ids, labels=ids)
        losses.append(out.lm_loss.item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_routing()
    assert losses[-1] < losses[0] - 0.3
    down_EDF = model.model.layers[0].mlp.experts.down_proj
    assert all(expert.abs().max() > 0 for expert in down_EDF)
    assert not torch.allclose(down_EDF[0], down_EDF[1])
    model.eval().save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", DENSE)
def test_samples_give_every_expert_its_share_of_the_tokens(name):
    dense, ids = build(name), token_ids(32)
    mask = (torch.arange(24) < 24 - torch.arange(32)[:, None] % 5).long()
    model = remoe.upcycle(dense, 4, k=1, granularity=2, samples=[{"input_ids": ids, "attention_mask": mask}])
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask)
        assert relative_error(outputs.logits[mask > 0], dense(ids, attention_mask=mask).logits[mask > 0]) < 1e-5
    for routing in outputs.routings:
        share_E = routing.count_E / mask.sum()
        torch.testing.assert_close(share_E, torch.full((8,), 0.25), atol=0.01, rtol=0)
        assert routing.logits_TE[mask.flatten() > 0].std(dim=0).sub(1).abs().max() < 0.05


def test_all_experts_can_be_wanted():
    ids = token_ids(16)
    with torch.no_grad():
        outputs = remoe.upcycle(build("llama"), 3, k=3, samples=[ids])(ids)
    assert all(routing.sparsity == 0 for routing in outputs.routings)


def test_the_bias_and_the_width_are_not_for_options():
    for options, name in (({"router_options": {"bias": False}}, "router"), ({"d_ffn": 48}, "intermediate_size")):
        with pytest.raises(ConfigError, match=f"upcycle itself sets {name}"):
            remoe.upcycle(build("llama"), 4, **options)


@pytest.mark.parametrize("name", ["router", "shared_expert_size", "vocab_size"])
def test_what_upcycle_sets_is_no_option(name):
    with pytest.raises(ConfigError, match=f"upcycle itself sets {name}"):
        remoe.upcycle(build("llama"), 4, **{name: 1})
