"""LoRA on attention and on the experts' 3-D weights: what trains, merge, unload, adapters saved and loaded."""

import copy

import pytest
import torch
from tiny_models import build, token_ids

import remoe
from remoe.integrations.trainer import routed_module

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = ["mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj"]


def own(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, initializer_range=0.1, **options)).eval()


def shared():
    return own(shared_expert_size=16)


def relufied():
    model = build("mixtral")
    remoe.relufy(model, [token_ids()], max_loss_increase=None)
    return model


MODELS = {"own": (own, "router"), "shared": (shared, "router"), "relufied": (relufied, "gate")}


def adapted(name, trains_router):
    make, router = MODELS[name]
    options = {"modules_to_save": [router]} if trains_router else {}
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=EXPERTS + (SHARED if name == "shared" else []),
        task_type="CAUSAL_LM",
        init_lora_weights=True,
        **options,
    )
    torch.manual_seed(0)
    return peft.get_peft_model(make(), config)


def train(model, steps=3):
    ids = token_ids()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    routed = routed_module(model)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        routed.update_routing()
    return model.eval()


@pytest.mark.parametrize("trains_router", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_trains_the_adapters_and_nothing_else(name, trains_router):
    model = adapted(name, trains_router)
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    for part in ("q_proj", "experts"):
        assert any(part in n and "lora" in n for n in moved)
    assert any("modules_to_save" in n for n in moved) == trains_router


@pytest.mark.parametrize("trains_router", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merged_model_computes_the_same_and_is_plain_again(name, trains_router):
    ids = token_ids(2)
    model = train(adapted(name, trains_router))
    with torch.no_grad():
        with_adapter = model(ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, with_adapter, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == MODELS[name][0]().state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_unloaded_model_is_the_old_one(name):
    ids = token_ids(2)
    expected = MODELS[name][0]()
    model = train(adapted(name, False))
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, expected(ids).logits)
        torch.testing.assert_close(model.unload()(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_adapter_is_saved_and_loaded(name, tmp_path):
    ids = token_ids(2)
    model = train(adapted(name, True))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS[name][0](), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_glora_takes_projections_that_are_made_plain():
    model, ids = own(), token_ids(2)
    expected = model(ids).logits
    for module in model.modules():
        if isinstance(module, remoe.matmul.Linear):
            module.__class__ = torch.nn.Linear
    config = peft.GloraConfig(target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.get_peft_model(model, config).eval()
    assert adapted(ids).logits.shape == expected.shape
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any("glora" in name and p.grad is not None for name, p in adapted.named_parameters())
