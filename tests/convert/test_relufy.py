"""relufy: every architecture from conversion to reload, the fit of the gates, the penalty, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file
from tiny_models import MIXTURES, SINCE_5_23, build, token_ids
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import remoe
from remoe.convert.relufy.experts import is_plain_swiglu, remoe_experts_forward
from remoe.convert.relufy.fit import fit_relu_gates, language_model_loss
from remoe.errors import ConfigError
from remoe.sparsity import SparsityController

PLAIN_LOOP = ("gpt_oss",)


@pytest.fixture(scope="module", params=MIXTURES)
def converted(request):
    if request.param in SINCE_5_23 and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("needs transformers 5.23")
    model = build(request.param)
    return request.param, copy.deepcopy(model), model, remoe.relufy(model, [token_ids()], max_loss_increase=None)


def test_architecture_converts_and_keeps_its_other_parts(converted):
    _, before, after, report = converted
    assert report.num_experts == 4
    assert report.k == 2
    assert abs(report.loss_after - report.loss_before) < 0.03 * report.loss_before  # random weights
    assert "experts per token" in str(report)
    weights = after.state_dict()
    routers = tuple(report.routers)
    kept = {name: value for name, value in before.state_dict().items() if not name.startswith(routers)}
    assert all(torch.equal(weights[name], value) for name, value in kept.items())


def test_the_loss_of_a_sample_does_not_depend_on_its_padding():
    model, ids = build("mixtral"), token_ids(2)
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    whole = language_model_loss(model, [{"input_ids": ids}])
    for dtype in (torch.int64, torch.bool, torch.float32):
        batch = {"input_ids": padded, "attention_mask": mask.to(dtype)}
        assert language_model_loss(model, [batch]) == pytest.approx(whole, rel=1e-5)


def test_routers_that_a_folder_lacks_start_as_new_ones(tmp_path):
    model = build("mixtral")
    remoe.relufy(model, [token_ids()], max_loss_increase=None)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    others = {name: weight for name, weight in weights.items() if ".gate." not in name}
    save_file(others, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = remoe.load_relufied(tmp_path)
    for layer in loaded.model.layers:
        assert 0 < layer.mlp.gate.weight.abs().max() < 8 * model.config.initializer_range
        assert not layer.mlp.gate.bias.any()
    new = type(loaded)(loaded.config)
    assert 0 < new.model.layers[0].mlp.gate.weight.abs().max() < 8 * model.config.initializer_range
    assert new.sparsity.lam == SparsityController(1, 4, 2).lam


def test_architecture_runs_equally_by_its_own_experts(converted):
    _, _, model, _ = converted
    ids = token_ids(2)
    with torch.no_grad():
        ours = model(ids).logits
        model.set_experts_implementation("eager")
        theirs = model(ids).logits
    model.set_experts_implementation("remoe")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_architecture_trains(converted):
    _, _, model, _ = converted
    model = copy.deepcopy(model).train()
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    lam = model.sparsity.lam.clone()
    model.update_routing()
    assert 0 < model.sparsity.sparsity < 1
    assert model.sparsity.lam > lam  # the fast start
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


def test_architecture_generates_as_without_a_cache(converted):
    _, _, model, _ = converted
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_architecture_is_saved_and_loaded(converted, tmp_path):
    _, _, model, _ = converted
    model.save_pretrained(tmp_path)
    again = remoe.load_relufied(tmp_path).eval()
    ids = token_ids(2)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again.sparsity.lam, model.sparsity.lam)
    assert type(again) is type(model)
    with pytest.raises(ValueError, match="relufied"):  # no TopK model will read it
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_function_equals_the_models_own(name):
    model, ids = build(name), token_ids(2)
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    assert all(is_plain_swiglu(module) == (name not in PLAIN_LOOP) for module in experts)
    gradients = []
    for implementation in ("eager", "remoe"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_experts_function_runs_no_pair_of_weight_zero():
    experts = build("mixtral").model.layers[0].mlp.experts
    x_TD = torch.randn(5, 32)
    with torch.no_grad():
        experts.gate_up_proj[3] = float("nan")
    index_TK = torch.tensor([[0, 3], [4, 1], [3, 2], [2, 0], [4, 4]])
    weight_TK = torch.tensor([[0.5, 0.0], [0.7, 0.2], [0.0, 0.3], [0.0, 0.0], [1.0, 1.0]])
    y_TD = remoe_experts_forward(experts, x_TD, index_TK, weight_TK)
    assert torch.isfinite(y_TD).all()
    assert not y_TD[3:].any()


def test_fit_finds_relu_gates_that_there_are():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(4096, 16, generator=generator)
    weight_ED = torch.randn(5, 16, generator=generator) * 0.1
    target_TE = F.relu(F.linear(x_TD, weight_ED) - 0.2)
    for start in (weight_ED * 3, None):
        found_ED, bias_E, error = fit_relu_gates(x_TD, target_TE, start)
        assert error < 0.01
        gate_TE = F.relu(F.linear(x_TD, found_ED, bias_E))
        torch.testing.assert_close(gate_TE, target_TE, rtol=0, atol=0.1)


def test_fit_survives_experts_without_tokens():
    x_TD = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    weight_ED, bias_E, error = fit_relu_gates(x_TD, torch.zeros(64, 3), torch.randn(3, 8), steps=5)
    assert torch.isfinite(weight_ED).all()
    assert torch.isfinite(bias_E).all()
    assert error >= 0


def test_experts_follow_autocast():
    experts, dtypes = build("mixtral").model.layers[0].mlp.experts, []
    ours = "remoe.convert.relufy.experts.run_experts"
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(ours, lambda x, *rest, **_: (dtypes.append((x.dtype, rest[0].dtype)), x)[1])
        y_TD = remoe_experts_forward(experts, torch.randn(2, 32), torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    assert y_TD.dtype == torch.float32


def test_own_topk_model_becomes_a_relu_model(tmp_path):
    torch.manual_seed(0)
    options = {"router": "topk", "num_experts_per_tok": 2, "granularity": 1, "initializer_range": 0.1}
    config = remoe.RemoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=4, **options
    )
    model, ids = remoe.RemoeForCausalLM(config).eval(), token_ids()
    report = remoe.relufy(model, [ids])
    assert report.k == 2
    assert type(model) is remoe.RemoeForCausalLM
    assert model.config.router == "relu"
    model.save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.mlp.router.bias.grad.any() for layer in model.model.layers)


def own_model(router, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    config = remoe.RemoeConfig(**sizes, num_experts_per_tok=1, router=router, initializer_range=0.1, **options)
    return remoe.RemoeForCausalLM(config).eval()


@pytest.mark.parametrize("router", ["threshold", "expert_choice", "relu_norm", "relu_scaled", "sigmoid"])
def test_an_own_model_keeps_its_k_and_its_cap_whatever_its_router_gives(router, tmp_path):
    cap = {"max_experts_per_token": 1} if router == "relu_scaled" else {}
    model, ids = own_model(router, **cap), token_ids()
    assert remoe.relufy(model, [ids], max_loss_increase=None).k == 1
    assert model.sparsity.target == 0.75
    model.save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.sparsity.target == 0.75


def test_an_own_model_without_a_learned_router_is_refused_and_stays_as_it_was():
    model, ids = own_model("hash"), token_ids()
    before = model(ids).logits
    with pytest.raises(ConfigError, match="router 'hash' has no learned choice"):
        remoe.relufy(model, [ids])
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("own", [False, True])
def test_too_large_a_rise_leaves_the_model_as_it_was(own):
    ids = token_ids()
    if own:
        torch.manual_seed(0)
        config = remoe.RemoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        config.router = "topk"
        model = remoe.RemoeForCausalLM(config).eval()
    else:
        model = build("mixtral")
    before, cls = language_model_loss(model, [{"input_ids": ids}]), type(model)
    state, text = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises(ConfigError, match="max_loss_increase"):
        remoe.relufy(model, [ids], max_loss_increase=-10.0)
    assert type(model) is cls
    assert model.config.to_json_string() == text
    assert model.state_dict().keys() == state.keys()
    assert language_model_loss(model, [{"input_ids": ids}]) == before


def test_unsupported_input_is_one_clear_error():
    ids = [token_ids()]
    with pytest.raises(ConfigError, match="no mixture of experts"):
        remoe.relufy(build("llama"), ids)
    with pytest.raises(ConfigError, match="no batch"):
        remoe.relufy(build("mixtral"), [])
    with pytest.raises(ConfigError, match="token ids of shape"):
        remoe.relufy(build("mixtral"), [torch.arange(4)])
    with pytest.raises(ConfigError, match="nothing but padding"):
        remoe.relufy(build("mixtral"), [{"input_ids": token_ids(), "attention_mask": torch.zeros_like(token_ids())}])
    with pytest.raises(ConfigError, match="MixtralModel has no head over the vocabulary"):
        remoe.relufy(build("mixtral").model, ids)
    with pytest.raises(ConfigError, match="Sequential is none; take it out of its wrapper"):
        remoe.relufy(nn.Sequential(build("mixtral")), ids)
    model = build("mixtral")
    model.model.layers[1].mlp.gate = nn.Linear(32, 4)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.gate is a plain linear layer"):
        remoe.relufy(model, ids)
    model = build("mixtral")
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(4, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.gate is quantised"):
        remoe.relufy(model, ids)
    model = build("mixtral")
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp \(MixtralSparseMoeBlock\)"):
        remoe.relufy(model, ids)
    model = build("mixtral")
    remoe.relufy(model, ids)
    with pytest.raises(ConfigError, match="ReLU routers already"):
        remoe.relufy(model, ids)


def test_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        remoe.load_relufied(tmp_path)
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'llama'"):
        remoe.load_relufied(tmp_path)


def test_every_rank_may_save_and_what_is_uploaded_is_what_is_written(tmp_path, monkeypatch):
    model = build("mixtral")
    remoe.relufy(model, [token_ids()], max_loss_increase=None)
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    save, seen = transformers.PreTrainedModel.save_pretrained, []

    def spied(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)  # with push_to_hub it uploads at its end
        seen.append(json.loads((folder / "config.json").read_text())["model_type"])

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spied)
    model.save_pretrained(tmp_path)
    assert seen == ["relufied"]
    assert model.config.model_type == "mixtral"
