"""The vLLM plugin: its routing and its names of weights against ours, and the whole model where vLLM is installed."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

import remoe
from remoe.errors import ConfigError
from remoe.integrations.vllm import check_config, gates_of, largest_gates, register, slots, vllm_weights
from remoe.routing import build_router

T, D, E = 40, 16, 6
ROUTERS = ("relu", "relu_norm", "relu_scaled", "topk", "sigmoid", "threshold")
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": E}


def layer_and_tokens(router="relu", **options):
    torch.manual_seed(0)
    layer = remoe.MoE(D, 24, E, 2, router, init_std=0.5, router_options=options).eval()
    return layer, torch.randn(T, D)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("c", [1, 3, E])
@torch.no_grad()
def test_the_routing_function_has_our_gates_under_the_cap(router, c):
    layer, x_TD = layer_and_tokens(router)
    weight_Tc, index_Tc = largest_gates(x_TD, gates_of(layer.router, x_TD), c, False)
    assert weight_Tc.shape == index_Tc.shape == (T, c)
    assert (weight_Tc.dtype, index_Tc.dtype) == (torch.float32, torch.int32)
    assert ((index_Tc >= 0) & (index_Tc < E)).all()  # engines have no expert E
    gate_TE = torch.zeros(T, E).scatter_add(1, index_Tc.long(), weight_Tc)
    assert torch.equal(gate_TE, layer.router(x_TD).pruned(0.0, c).gate_TE)
    theirs = MixtralExperts(MixtralConfig(hidden_size=D, intermediate_size=24, num_local_experts=E))
    theirs.load_state_dict(layer.experts.state_dict())
    layer.max_experts = c
    torch.testing.assert_close(theirs(x_TD, index_Tc.long(), weight_Tc), layer(x_TD)[0], rtol=1e-5, atol=1e-5)


def test_free_slots_name_an_expert_that_the_token_has_already():
    gate_TE = torch.tensor([[0.0, 0.0, 0.7, 0.0], [0.2, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    weight_Tc, index_Tc = largest_gates(torch.zeros(3, D), gate_TE, 3, False)
    assert index_Tc[:2].tolist() == [[2, 2, 2], [3, 0, 3]]
    assert len(set(index_Tc[2].tolist())) == 1
    torch.testing.assert_close(weight_Tc, torch.tensor([[0.7, 0, 0], [0.5, 0.2, 0], [0, 0, 0]]))
    with pytest.raises(ConfigError, match="renormalised"):
        largest_gates(torch.zeros(3, D), gate_TE, 3, True)


@pytest.mark.parametrize(
    ("changes", "c"),
    [
        ({}, E),
        ({"max_experts": 2}, 2),
        ({"max_experts": 3, "granularity": 2, "k": 2}, 3),
        ({"router_options": {"max_experts_per_token": 4}}, 4),
        ({"router_options": {"max_experts_per_token": 4}, "max_experts": 5}, 4),
    ],
    ids=str,
)
def test_slots_are_the_cap_of_model_or_router(changes, c):
    config = remoe.RemoeConfig(**SIZES, **changes)
    k = config.active_per_token
    router = build_router(config.router, D, config.experts_per_layer, k, **(config.router_options or {}))
    assert slots(config, router) == c


@pytest.mark.parametrize("options", [{}, {"shared_expert_size": 8, "router": "relu_scaled"}, {"router": "sigmoid"}])
def test_every_weight_of_a_checkpoint_is_mapped_once_and_comes_back(options):
    torch.manual_seed(0)
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, initializer_range=0.3, **options))
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("sparsity.")}
    mapped = list(vllm_weights(model.state_dict().items()))
    names = [name for name, _ in mapped]
    assert len(set(names)) == len(names)
    assert sum(weight.numel() for _, weight in mapped) == sum(weight.numel() for weight in state.values())
    back, new = {}, dict(mapped)
    for name, weight in mapped:
        if ".shared_expert." not in name:
            back[name] = weight
        elif ".gate_proj." in name:
            halves = weight, new[name.replace(".gate_proj.", ".up_proj.")]
            back[name.replace(".gate_proj.weight", ".gate_up_proj")] = torch.cat(halves)[None]
        elif ".down_proj." in name:
            back[name.removesuffix(".weight")] = weight[None]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], weight) for name, weight in state.items())


def test_the_entry_point_registers_configuration_and_model(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(text.startswith("vllm") for text in project["optional-dependencies"]["vllm"])
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    assert EntryPoint("remoe", value, "vllm.general_plugins").load() is register
    found, stand_in = {}, ModuleType("vllm")
    stand_in.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    register()
    ((architecture, place),) = found.items()
    assert architecture == remoe.RemoeForCausalLM.__name__
    module, name = place.split(":")
    source = Path(find_spec(module).origin).read_text()
    assert f"class {name}(" in source
    from transformers import AutoConfig

    assert type(AutoConfig.for_model("remoe")) is remoe.RemoeConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "hash"}, "a token's own state"),
        ({"router": "dense"}, "a token's own state"),
        ({"router": "lory"}, "a token's own state"),
        ({"router": "expert_choice", "router_options": {"causal_evaluation": False}}, "a token's own state"),
        ({"qk_norm": True, "attention_bias": True}, "attention_bias"),
    ],
    ids=str,
)
def test_models_that_vllm_would_compute_otherwise_are_refused(changes, words):
    config = remoe.RemoeConfig(**SIZES, **changes)
    with pytest.raises(ConfigError, match=words):
        check_config(config, build_router(config.router, D, E, 1, **(config.router_options or {})))


IN_VLLM = """
import sys, torch
from vllm import LLM, SamplingParams

options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 32, "max_logprobs": -1}
engine = LLM(sys.argv[1], skip_tokenizer_init=True, **options)
prompt = {"prompt_token_ids": list(range(1, 13))}
sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=-1, detokenize=False, ignore_eos=True)
(answer,) = engine.generate([prompt], sampling)
rows = [[row[i].logprob for i in range(60)] for row in answer.prompt_logprobs[1:]]
torch.save((torch.tensor(rows), list(answer.outputs[0].token_ids)), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_computes_our_logits_and_tokens(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 64, "tokenizer_size": 60}
    options = {"max_experts": 3, "k": 2, "shared_expert_size": 64, "qk_norm": True, "initializer_range": 0.15}
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, **options)).eval()
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", IN_VLLM, str(tmp_path / "model"), str(tmp_path / "answer.pt")]
    subprocess.run(command, check=True, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    logprob_SV, tokens = torch.load(tmp_path / "answer.pt")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected_SV = model(ids).logits[0, :-1, :60].log_softmax(dim=-1)
    torch.testing.assert_close(logprob_SV, expected_SV, rtol=0, atol=1e-4)
    ours = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens == ours[0, 12:].tolist()
