"""`remoe export --max-experts`: transformers' contract of experts, and the same logits as ours under the cap."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_run import FLAGS
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

import remoe
from remoe.experts import is_quantised
from remoe.lab.cli.main import main
from remoe.lab.export import _loss
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_model, load_run
from remoe.models.capped import CappedExperts, CappedMoE

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 6}


def build(**options):
    torch.manual_seed(0)
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, initializer_range=0.3, **options)).eval()


@pytest.mark.parametrize("options", [{}, {"granularity": 2, "k": 2}, {"router": "sigmoid", "k": 4}], ids=str)
@torch.no_grad()
def test_logits_equal_ours_under_the_cap(options):
    ids = torch.randint(64, (3, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()
    ours, capped = build(**options), build(**options, max_experts=2)
    capped.load_state_dict(ours.state_dict())
    free = ours(ids, attention_mask=mask).logits
    ours.set_max_experts(2)
    expected, found = (model(ids, attention_mask=mask) for model in (ours, capped))
    assert (expected.logits - free).abs().max() > 1e-3  # the cap matters
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], rtol=0, atol=1e-5)
    for a, b in zip(found.routings, expected.routings, strict=True):
        assert torch.equal(a.count_E, b.count_E)
    torch.testing.assert_close(
        capped.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0),
        ours.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0),
    )


def test_the_experts_have_the_contract_of_transformers():
    layer = CappedMoE(3, 16, 24, 6, 1, init_std=0.3).eval()
    slots = []
    layer.experts.register_forward_pre_hook(lambda module, given: slots.append(given))
    x_TD = torch.randn(40, 16)
    with torch.no_grad():
        y_TD, routing = layer(x_TD)
        hidden, index_Tc, weight_Tc = slots[0]
        theirs = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6))
        theirs.load_state_dict(layer.experts.state_dict())
        torch.testing.assert_close(theirs(hidden, index_Tc, weight_Tc), y_TD, rtol=1e-5, atol=1e-5)
    assert index_Tc.shape == weight_Tc.shape == (40, 3)
    assert index_Tc.dtype == torch.int64
    used = weight_Tc > 0
    assert ((index_Tc >= 0) & (index_Tc < 6)).all()  # engines read past their weights otherwise
    assert torch.equal(index_Tc, torch.where(used, index_Tc, index_Tc[:, :1]))
    assert torch.equal(used.sum(dim=1), (routing.gate_TE > 0).sum(dim=1))
    assert 0 < used.sum() < used.numel()  # some slots are free
    active = (layer.router(x_TD).gate_TE > 0).sum(dim=1)
    assert torch.equal(used.sum(dim=1), active.clamp(max=3))


def test_gradients_reach_router_and_experts():
    model = build(max_experts=2).train()
    ids = torch.randint(64, (2, 12))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert all(isinstance(layer.mlp.experts, CappedExperts) for layer in model.model.layers)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("capped") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(folder), "--steps", "3", *FLAGS]) == 0
    return folder


def test_the_command_writes_the_capped_form_and_what_it_costs(corpus, run, tmp_path, capsys):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert main(["export", str(run), str(out), "--max-experts", "1"]) == 0
    assert json.loads((out / "config.json").read_text())["max_experts"] == 1
    assert (out / "remoe_models_capped.py").is_file()
    card = (out / "README.md").read_text()
    assert main(["eval", str(out), "--data", str(corpus), "--json", str(figures)]) == 0
    with_cap = json.loads(figures.read_text())["all"]
    assert with_cap["sparsity"] >= 0.75
    without = json.loads((run / "summary.json").read_text())["validation_loss"]
    assert f"| validation loss without the cap | {without:.4f} |" in card
    assert f"| validation loss with the cap | {with_cap['loss']:.4f} |" in card
    assert f"{with_cap['loss']:.4f}" != f"{without:.4f}"
    evaluation = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert evaluation == pytest.approx({name: with_cap[name] for name in ("loss", "perplexity")}, rel=1e-5)
    assert "does not use has the weight 0" in card
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "none"), "--max-experts", "0"]) == 2
    assert "max_experts must be at least 1, but is 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_trimmed_export_has_the_tokens_alone_and_the_same_loss(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--trim-vocabulary"]) == 0
    model, tokenizer, _ = load_model(out)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(tokenizer) == 300
    assert _loss(model, RunFolder(run)) == pytest.approx(_loss(load_run(run)[0], RunFolder(run)))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_command_writes_smaller_weights_and_what_they_cost(scheme, corpus, run, tmp_path, capsys):
    if scheme == "int8":
        pytest.importorskip("torchao")
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--max-experts", "2", "--quantize", scheme]) == 0
    assert "remoe train" not in capsys.readouterr().out  # such weights take no gradients
    assert main(["train", "--from", str(out), "--data", str(corpus), "--out", str(tmp_path / "run")]) == 2
    assert "quantised weights, which cannot be trained" in capsys.readouterr().err
    expected = load_run(run)[0]
    expected.set_max_experts(2)
    before = _loss(expected, RunFolder(run))
    remoe.quantize(expected, scheme)
    loaded = remoe.RemoeForCausalLM.from_pretrained(out).eval()
    assert is_quantised(loaded.model.layers[0].mlp.experts.gate_up_proj)
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    card = (out / "README.md").read_text()
    assert f"| validation loss before | {before:.4f} |" in card
    assert f"| validation loss after | {_loss(loaded, RunFolder(run)):.4f} |" in card
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert f"| {size / 1e6:.1f} MB |" in card
    assert "without the cap and quantisation" in card
