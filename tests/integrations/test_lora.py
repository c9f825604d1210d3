"""LoRA on the pairs against PEFT's own: outputs, gradients, merging, files; and what it refuses."""

import copy
import logging

import pytest
import torch
from tiny_models import build, token_ids

from remoe.errors import ConfigError

peft = pytest.importorskip("peft")

from integrations.test_peft import EXPERTS, MODELS, SHARED, own, train  # noqa: E402

from remoe.integrations.lora import ParamWrapper, lora_on_pairs  # noqa: E402


def config(name="own", **options):
    targets = EXPERTS + (SHARED if name == "shared" else [])
    given = {"r": 4, "target_parameters": targets, "target_modules": ["q_proj"], "modules_to_save": [MODELS[name][1]]}
    return peft.LoraConfig(**given | {"init_lora_weights": False} | options)


def with_adapters(name="own", **options):
    """A model with adapters that change something from the start."""
    make = MODELS[name][0]
    torch.manual_seed(0)
    return peft.get_peft_model(make(), config(name, **options))


def pair(name="own", **options):
    """The model as PEFT runs it, and with adapters on the pairs."""
    theirs = with_adapters(name, **options)
    ours = copy.deepcopy(theirs)
    weights = lora_on_pairs(ours)
    if not options:
        assert {weight.removeprefix("base_model.model.") for weight in weights} <= MODELS[name][0]().state_dict().keys()
        assert len(weights) == (8 if name == "shared" else 4)
    return theirs, ours


def step(model):
    """Logits, and the gradients by name."""
    ids = token_ids(3)
    model.train()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    with torch.no_grad():
        logits = model.eval()(ids).logits
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(theirs, ours):
    logits, expected = step(theirs)
    found_logits, found = step(ours)
    torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    assert any("experts" in name and "lora_A" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_equals_peft_and_merges_to_the_same(name):
    theirs, ours = pair(name)
    check_same(theirs, ours)
    merged = [model.merge_and_unload().state_dict() for model in (theirs, ours)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


VARIANTS = {
    "down alone": {"target_parameters": EXPERTS[1:]},
    "gate_up alone": {"target_parameters": EXPERTS[:1]},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_options_of_peft(options):
    check_same(*pair(**options))


def test_recomputation_and_experts_without_pairs():
    theirs, ours = pair()
    for model in (theirs, ours):
        for block in model.base_model.model.model.layers:
            router = block.mlp.router.modules_to_save["default"]
            router.weight.data[1] = 0  # a logit of zero: no pair
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.enable_input_require_grads()
    check_same(theirs, ours)
    gradient = ours.base_model.model.model.layers[0].mlp.experts.base_layer.lora_A["default"].weight.grad
    assert gradient.view(4, 4, -1)[0].any()
    assert not gradient.view(4, 4, -1)[1].any()


def test_several_active_adapters_and_none():
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("second", config(modules_to_save=None, r=3))
        model.base_model.set_adapter(["default", "second"])
    check_same(theirs, ours)
    ids = token_ids(2)
    with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert torch.equal(ours(ids).logits, own()(ids).logits)


@pytest.mark.parametrize("saver", ["theirs", "ours"])
def test_files_are_those_of_peft(saver, tmp_path):
    theirs, ours = pair()
    for name, model in {"theirs": theirs, "ours": ours}.items():
        train(model)
        model.save_pretrained(tmp_path / name)
    files = [peft.utils.load_peft_weights(str(tmp_path / name)) for name in ("theirs", "ours")]
    assert {key: tensor.shape for key, tensor in files[0].items()} == {k: t.shape for k, t in files[1].items()}
    loaded = [peft.PeftModel.from_pretrained(own(), tmp_path / saver).eval() for _ in range(2)]
    lora_on_pairs(loaded[1])
    ids = token_ids(2)
    with torch.no_grad():
        expected = {"theirs": theirs, "ours": ours}[saver](ids).logits
        for model in loaded:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bitwise_equal():
    runs = []
    for _ in range(2):
        model = with_adapters()
        lora_on_pairs(model)
        runs.append(train(model).state_dict())
    assert all(torch.equal(runs[0][name], tensor) for name, tensor in runs[1].items())


def test_under_autocast_and_in_bfloat16():
    theirs, ours = pair()
    ids = token_ids(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=3e-2, atol=3e-2)
    model = peft.get_peft_model(own().bfloat16(), config())  # PEFT keeps adapters in float32
    lora_on_pairs(model)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "experts" in name and "lora" in name]
    assert len(gradients) == 8
    assert all(g.dtype is torch.float32 and g.isfinite().all() and g.any() for g in gradients)


def test_a_model_of_transformers_on_our_experts():
    model = build("mixtral")
    model.set_experts_implementation("remoe")
    theirs = peft.get_peft_model(model, config(modules_to_save=None))
    ours = copy.deepcopy(theirs)
    lora_on_pairs(ours)
    check_same(theirs, ours)
    ours.base_model.model.set_experts_implementation("eager")
    with pytest.raises(ConfigError, match="without the adapter of its gate_up_proj"):
        ours(token_ids(2))


@pytest.mark.slow
def test_one_graph_holds_the_model():
    theirs, ours = pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ids = token_ids(3)
    losses = [model.train()(input_ids=ids, labels=ids).loss for model in (theirs, ours)]
    compiled_loss = compiled(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(compiled_loss, losses[0])
    losses[1].backward()
    expected = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    compiled_loss.backward()
    for name, gradient in expected.items():
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_left_to_peft_with_a_warning(caplog):
    model = peft.get_peft_model(own(router="lory"), config(modules_to_save=None))
    with caplog.at_level(logging.WARNING):
        assert lora_on_pairs(model) == []
    assert "layers.0.mlp.experts.down_proj and 3 more weights: MergedExperts are merged before they run" in caplog.text
    model = peft.get_peft_model(own(backend="triton"), config(modules_to_save=None))
    assert lora_on_pairs(model) == []
    assert "backend 'triton' cannot compute with adapters" in caplog.text
    eager = peft.get_peft_model(build("mixtral"), config(modules_to_save=None))
    lora_on_pairs(eager)
    assert not any(isinstance(module, ParamWrapper) for module in eager.modules())
    assert "run by the implementation" in caplog.text


def test_refusals():
    attention = peft.get_peft_model(own(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has no LoRA adapters on gate_up_proj or down_proj"):
        lora_on_pairs(attention)
    for unsupported in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(ValueError, match="ParamWrapper does not work with"):
            with_adapters(**unsupported)
    _, trained = pair()
    trained.base_model.model.model.layers[0].mlp.experts.get_base_layer().gate_up_proj.requires_grad_(True)
    with pytest.raises(ConfigError, match="gate_up_proj has adapters on the pairs and is trained itself"):
        trained(token_ids(2))
