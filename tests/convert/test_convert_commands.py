"""`remoe convert`: what it writes is what the functions make, and every other command takes it."""

import json

import pytest
import torch
from tiny_run import FLAGS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import remoe
from remoe.convert.relufy.model import RelufiedMixin
from remoe.lab.cli.main import main
from remoe.lab.data import TrainBatches, open_dataset
from remoe.lab.training.load import load_model, load_run

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(40).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def save(model, corpus, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder)
    return model.eval()


@pytest.fixture
def dense(corpus, tmp_path):
    config = LlamaConfig(**SIZES, vocab_size=300, max_position_embeddings=64, initializer_range=0.3)
    return save(LlamaForCausalLM(config), corpus, tmp_path / "dense")


@pytest.fixture
def mixture(corpus, tmp_path):
    config = MixtralConfig(**SIZES, vocab_size=300, num_local_experts=4, num_key_value_heads=4)
    return save(MixtralForCausalLM(config), corpus, tmp_path / "mixture")


def test_upcycle(dense, corpus, tmp_path, capsys):
    source, out, figures = (str(tmp_path / name) for name in ("dense", "out", "figures.json"))
    flags = ["--num-experts", "4", "--granularity", "2", "--data", str(corpus), "--sample-tokens", "2048"]
    assert main(["convert", "upcycle", source, out, *flags]) == 0
    said = capsys.readouterr().out
    assert "the logits are unchanged" in said
    assert f"remoe train --from {out} --data {corpus}" in said
    model = remoe.RemoeForCausalLM.from_pretrained(out).eval()
    assert (model.config.num_experts, model.config.granularity) == (4, 2)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert main(["eval", out, "--data", str(corpus), "--json", figures]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["all"]["sparsity"] == pytest.approx(0.75, abs=0.05)
    assert main(["report", out, "--data", str(corpus), "--excerpt", "5"]) == 0


def test_relufy(mixture, corpus, tmp_path, capsys):
    source, out = str(tmp_path / "mixture"), str(tmp_path / "out")
    assert main(["convert", "relufy", source, out, "--data", str(corpus), "--sample-tokens", "2048"]) == 0
    assert "2 routers of 4 experts, TopK with k = 2, now ReLU" in capsys.readouterr().out
    model, _, _ = load_model(out)
    assert isinstance(model, RelufiedMixin)
    weights, old = model.state_dict(), mixture.state_dict()
    for name, weight in old.items():  # all but the routers stay
        assert torch.equal(weights[name], weight) == (not name.endswith("gate.weight")), name
    windows = TrainBatches(open_dataset(corpus).train, 512, 1, seed=0)
    remoe.relufy(mixture, [windows.batch(step)[:, :-1] for step in range(4)])
    torch.testing.assert_close(logits(model), logits(mixture), rtol=1e-4, atol=1e-5)  # the same fit, in float32
    assert main(["generate", out, "--prompt", "cow", "--max-new-tokens", "3"]) == 0
    assert main(["eval", out, "--data", str(corpus)]) == 0


@pytest.mark.slow
def test_relufy_of_a_run(corpus, tmp_path):
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["train", "--data", str(corpus), "--out", run, "--steps", "4", "--router", "topk", *FLAGS]) == 0
    assert main(["convert", "relufy", run, out, "--data", str(corpus), "--sample-tokens", "2048"]) == 0
    model = remoe.RemoeForCausalLM.from_pretrained(out)
    assert model.config.router == "relu"
    old = load_run(run)[0].state_dict()
    for name, weight in model.state_dict().items():
        assert "router" in name or "sparsity" in name or torch.equal(weight, old[name]), name
    assert main(["eval", out, "--data", str(corpus)]) == 0


def test_megatron(corpus, tmp_path):
    config = remoe.RemoeConfig(
        **SIZES, vocab_size=300, num_experts=4, regularizer_normalization="official", sparsity={"rule": "official"}
    )
    model = remoe.RemoeForCausalLM(config).eval()
    remoe.save_megatron(model, tmp_path / "theirs")
    source, out = str(tmp_path / "theirs"), str(tmp_path / "out")
    assert main(["convert", "megatron", source, out, "--tokenizer", str(corpus / "tokenizer")]) == 0
    torch.testing.assert_close(logits(load_model(out)[0]), logits(model), rtol=1e-4, atol=1e-5)
    assert main(["eval", out, "--data", str(corpus)]) == 0


@pytest.mark.usefixtures("mixture")
def test_what_cannot_be_converted_leaves_nothing(corpus, tmp_path, capsys):
    source, out = str(tmp_path / "mixture"), tmp_path / "out"
    relufy = ["convert", "relufy", source, str(out), "--data", str(corpus), "--sample-tokens", "256"]
    for arguments, words in (
        ([*relufy, "--max-loss-increase", "-9"], "by more than max_loss_increase = -9"),
        ([*relufy[:-1], "1"], "--sample-tokens must be at least 2, but is 1"),
        ([*relufy[:-1], "1000000000000"], "--sample-tokens 1,000,000,000,000 is more than "),
        (["convert", "upcycle", source, str(out)], "mixtral"),
        (["convert", "upcycle", "no/such-model", str(out)], "cannot load no/such-model"),
        (["convert", "relufy", source, str(out)], "--data missing"),
        (["convert", "relufy", source, source, "--data", str(corpus)], "already exists and is not an empty folder"),
        (["convert", "megatron", str(tmp_path), str(out)], "latest_checkpointed_iteration.txt"),
        (["convert", "relufy", source, str(out), "--data", "nowhere"], "nowhere"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert "\n" not in error
        assert not out.exists()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(source)
    definition = tmp_path / "mixture" / "tokenizer.json"
    values = json.loads(definition.read_text())
    values["model"]["merges"].pop()  # as many tokens, but another tokenizer
    definition.write_text(json.dumps(values))
    assert main(relufy) == 2
    assert "prepared with a tokenizer different from" in capsys.readouterr().err
