"""RemoeConfig: names, aliases, names of version 0.1.0, and overrides while a model is loaded."""

import json

import pytest
import torch

import remoe
from remoe.errors import ConfigError

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4}
OLD = {"sparsity_rule": "smooth", "lambda_init": 1e-3, "lambda_alpha": 1.5, "lambda_fast_start": True}
NEW = {"rule": "smooth", "lambda_init": 1e-3, "alpha": 1.5, "fast_start": True}


def test_aliases_are_the_same_numbers_and_are_checked():
    config = remoe.RemoeConfig(**SIZES, k=2, d_ffn=50, granularity=5)
    assert (config.k, config.num_experts_per_tok, config.d_ffn, config.intermediate_size) == (2, 2, 50, 50)
    assert (config.experts_per_layer, config.active_per_token) == (20, 10)
    assert "k" not in config.to_dict()
    with pytest.raises(ConfigError, match="k = 9 and E = 4"):
        remoe.RemoeConfig(**SIZES, k=9)


def test_names_of_0_1_0_become_todays():
    old = remoe.RemoeConfig(**SIZES, **OLD, experts_backend="loop", load_balance=False, max_experts_per_token=2)
    new = remoe.RemoeConfig(
        **SIZES, sparsity=NEW, backend="cpu", router_options={"load_balance": False, "max_experts_per_token": 2}
    )
    assert old.to_dict() == new.to_dict()
    assert remoe.RemoeConfig(**SIZES, lambda_init=0.5, sparsity={"lambda_init": 0.25}).sparsity["lambda_init"] == 0.25
    assert remoe.RemoeConfig(**SIZES, router="topk", load_balance=False).router_options is None  # as in 0.1.0
    with pytest.raises(ConfigError, match="'topk' has no option 'max_experts_per_token'"):
        remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, router="topk", max_experts_per_token=2))


@pytest.mark.parametrize("file", ["of today", "of 0.1.0"])
@pytest.mark.parametrize("given", [{"lambda_init": 0.5}, {"sparsity": {"lambda_init": 0.5}}], ids=["old", "new"])
def test_overrides_are_merged_with_the_file(file, given, tmp_path):
    remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, sparsity=NEW)).save_pretrained(tmp_path)
    if file == "of 0.1.0":
        path = tmp_path / "config.json"
        content = json.loads(path.read_text())
        content.pop("sparsity")
        path.write_text(json.dumps(content | OLD | {"experts_backend": "loop"}))
    model = remoe.RemoeForCausalLM.from_pretrained(tmp_path, **given, router_options={"gate_scale": 4.0})
    assert model.config.sparsity == NEW | {"lambda_init": 0.5}
    assert (model.sparsity.alpha, model.sparsity.fast_start) == (1.5, True)
    assert model.model.layers[0].mlp.router.gate_scale == 4.0
    with pytest.raises(ConfigError, match="unknown option of sparsity 'rle'"):
        remoe.RemoeForCausalLM.from_pretrained(tmp_path, sparsity={"rle": "sign"})


@pytest.mark.parametrize(("router", "factor"), [("relu", 5.0), ("relu_scaled", 5.0), ("topk", 1.0), ("sigmoid", 1.0)])
def test_router_std_is_that_of_routers_which_lambda_steers(router, factor):
    models = []
    for given in ({}, {"router_std": 0.1}):
        torch.manual_seed(0)
        config = remoe.RemoeConfig(**SIZES, router=router, initializer_range=0.02, **given)
        models.append(remoe.RemoeForCausalLM(config))
    plain, scaled = (model.model.layers[0].mlp for model in models)
    torch.testing.assert_close(scaled.router.weight, plain.router.weight * factor)
    assert torch.equal(scaled.experts.down_proj, plain.experts.down_proj)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_router_std_is_a_finite_number_above_zero(value):
    with pytest.raises(ConfigError, match="router_std must be finite and above 0"):
        remoe.RemoeConfig(**SIZES, router_std=value)


@pytest.mark.parametrize("given", [{"alpha": "1.2"}, {"fast_start": "no"}, {"lambda_init": None}])
def test_values_of_another_type_are_named(given):
    (name,) = given
    with pytest.raises(ConfigError, match=f"sparsity: {name} must be like"):
        remoe.RemoeConfig(**SIZES, sparsity=given)


def test_a_step_of_several_micro_batches_compiles_once():
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES)).train()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, ids = torch.compile(model, backend=count), torch.randint(32, (2, 8))
    for _ in range(2):
        for _ in range(2):
            compiled(ids, labels=ids).loss.backward()
        model.update_routing()
    assert len(graphs) == 1


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-5])
def test_the_norms_epsilon_is_finite_and_not_negative(eps):
    with pytest.raises(ConfigError, match="rms_norm_eps must be finite and not negative"):
        remoe.RemoeConfig(**SIZES, rms_norm_eps=eps)
