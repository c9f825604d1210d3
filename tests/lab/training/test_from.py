"""`remoe train --from`: what a run starts from, what it keeps of it, and that it can be stopped as any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import FLAGS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from whole_run import same_run, weights

import remoe
from remoe.lab.cli.main import main
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.training.checkpoint import list_checkpoints
from remoe.lab.training.config import CheckpointOptions
from remoe.lab.training.load import load_model, load_run
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.origin import open_origin
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.saving import ShardedSaving
from remoe.lab.training.validate import evaluate, total

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2}
SHORT = ["--batch-size", "4", "--micro-batch-size", "2", "--seq-len", "32", "--device", "cpu"]
SLOW = pytest.mark.slow
LORA = ["--lora.rank", "2"]


def tune(folder, corpus, out, steps, *flags):
    data = ["--data", str(corpus), "--out", str(out), "--steps", str(steps)]
    return main(["train", "--from", str(folder), *data, *SHORT, *flags])


@pytest.fixture(scope="module")
def origins(corpus, tmp_path_factory) -> Path:
    """A run of 4 steps, its export, an upcycled dense model and a relufied mixture of transformers."""
    root = tmp_path_factory.mktemp("origins")
    assert main(["train", "--data", str(corpus), "--out", str(root / "run"), "--steps", "3", *FLAGS]) == 0
    assert main(["export", str(root / "run"), str(root / "export")]) == 0
    torch.manual_seed(0)
    ids = torch.arange(120).view(4, 30)
    models = {"upcycled": remoe.upcycle(LlamaForCausalLM(LlamaConfig(**SIZES)), 4, 1, samples=[ids])}
    models["relufied"] = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    remoe.relufy(models["relufied"], [ids], max_loss_increase=None)
    for name, model in models.items():
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(root / name)
    sharded(shutil.copytree(root / "run", root / "run of several processes"))
    return root


def sharded(run):
    """Writes the checkpoint of a run as several processes write theirs."""
    model, _, checkpoint = load_run(run)
    info = json.loads((checkpoint / "training.json").read_text())
    saving = ShardedSaving(Ranks(Mesh()), CheckpointOptions())
    optimizer = torch.optim.AdamW(model.parameters())
    saving.start(checkpoint.parent, info["step"], model, optimizer, {"data": info["data"]}, [0.5] * info["step"])
    saving.wait()
    assert not list(checkpoint.glob("model*"))


def loss_of(folder, corpus) -> float:
    return total(
        evaluate(load_model(folder)[0], ValidationWindows(open_dataset(corpus).validation, 32), batch_size=32)
    ).loss


def summary_of(out) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("flags", [[], pytest.param(LORA, marks=SLOW)], ids=str)
@pytest.mark.parametrize("kind", ["run", "run of several processes", "export", "upcycled", "relufied"])
def test_zero_steps_leave_the_loss_as_it_was(origins, corpus, tmp_path, capsys, kind, flags):
    before = loss_of(origins / kind, corpus)
    assert tune(origins / kind, corpus, tmp_path / "out", 0, *flags) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["validation_loss"] == summary["start"]["validation"]["all"]["loss"] == before
    assert loss_of(tmp_path / "out", corpus) == before
    assert f"validation loss at the start {before:.4f}: +0.0000 since then" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("export", []),
        pytest.param("upcycled", [], marks=SLOW),
        pytest.param("relufied", [], marks=SLOW),
        pytest.param("export", LORA, marks=SLOW),
        pytest.param("upcycled", LORA, marks=SLOW),
        pytest.param("relufied", LORA, marks=SLOW),
    ],
    ids=str,
)
def test_stopped_and_resumed_equals_uninterrupted(origins, corpus, tmp_path, kind, flags):
    folder = shutil.copytree(origins / kind, tmp_path / "model")
    assert tune(folder, corpus, tmp_path / "whole", 4, "--checkpoint.every", "2", *flags) == 0
    out = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (out / "summary.json").unlink()
    shutil.rmtree(list_checkpoints(out / "checkpoints")[-1])
    if not flags:
        shutil.rmtree(folder)  # the run's own checkpoint has all
    assert main(["train", "--out", str(out), "--resume"]) == 0
    same_run(tmp_path / "whole", out)
    assert summary_of(out)["start"] == summary_of(tmp_path / "whole")["start"]
    assert summary_of(out)["validation_loss"] < summary_of(out)["start"]["validation"]["all"]["loss"]


def test_the_state_of_sparsity_control_goes_on(origins, corpus, tmp_path):
    assert tune(origins / "run", corpus, tmp_path / "out", 1, "--sparsity.rule", "sign") == 0
    lam = load_run(origins / "run")[0].sparsity.lam.item()
    first, *_ = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["lambda"] == lam > 1e-8
    assert load_run(tmp_path / "out")[0].sparsity.lam.item() == pytest.approx(1.2 * lam)  # Eq. 7: too dense
    assert tune(origins / "run", corpus, tmp_path / "anew", 1, "--sparsity.lambda-init", "1e-3") == 0
    assert json.loads((tmp_path / "anew" / "metrics.jsonl").read_text())["lambda"] == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["upcycled", pytest.param("relufied", marks=SLOW)])
def test_lora_changes_adapted_weights_and_routers_and_merges_them(origins, corpus, tmp_path, kind):
    out = tmp_path / "out"
    assert tune(origins / kind, corpus, out, 3, *LORA, "--recompute") == 0
    old, new = (load_model(place)[0].state_dict() for place in (origins / kind, out))
    changed = {name for name in old if not torch.equal(old[name].float(), new[name].float())}
    adapted = {name for name in old if any(part in name for part in ("_proj", "router", "mlp.gate", "sparsity"))}
    assert old.keys() == new.keys()
    assert changed <= adapted
    assert {name for name in old if "experts." in name or "self_attn" in name or "router" in name} <= changed
    # The summary's loss is that of the model with adapters, the other of the merged one.
    assert loss_of(out, corpus) == pytest.approx(summary_of(out)["validation_loss"], abs=1e-5)


@SLOW
def test_frozen_weights_that_changed_are_not_used(origins, corpus, tmp_path, capsys):
    folder, out = shutil.copytree(origins / "export", tmp_path / "model"), tmp_path / "out"
    assert tune(folder, corpus, out, 2, *LORA) == 0
    (out / "summary.json").unlink()
    model = remoe.RemoeForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data += 1
    model.save_pretrained(folder)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert f"has changed since {out} started from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("export", ["--num-experts", "8"], "--num-experts 8: the model in "),
        ("export", ["--router", "topk"], "has relu"),
        ("export", ["--model.hidden-size", "64"], "has 32"),
        ("export", ["--seq-len", "64"], "is for at most 32 tokens"),
        ("export", ["--router-options", "bias", "true"], "others would need other weights"),
        ("relufied", ["--mask-documents"], "--mask-documents cannot be used yet"),
        ("nothing", [], "no model there"),
    ],
)
def test_what_contradicts_the_model_is_one_line(origins, corpus, tmp_path, capsys, kind, flags, words):
    assert tune(origins / kind, corpus, tmp_path / "out", 0, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_file_may_name_the_model_and_not_contradict_it(origins, corpus, tmp_path, capsys):
    file, out = tmp_path / "options.yaml", tmp_path / "out"
    file.write_text(f"from: {origins / 'export'}\ndata: {corpus}\nnum_experts: 8\n")
    assert main(["train", "--config", str(file), "--out", str(out)]) == 2
    assert f"{file}: --num-experts 8: the model in" in capsys.readouterr().err
    file.write_text(f"from: {origins / 'export'}\ndata: {corpus}\nrouter_options: {{max_experts_per_token: 1}}\n")
    assert main(["train", "--config", str(file), "--out", str(out), "--steps", "0", *SHORT]) == 0
    model = load_run(out)[0]
    assert model.config.router_options == {"max_experts_per_token": 1}
    assert summary_of(out)["validation"]["all"]["sparsity"] >= 0.75


def test_data_is_that_of_the_run_or_must_be_given_in_its_tokens(origins, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--from", str(origins / "run"), "--out", str(out), "--steps", "0", *SHORT]) == 0
    assert str(corpus) in (out / "config.yaml").read_text()
    assert main(["train", "--from", str(origins / "export"), "--out", str(tmp_path / "none")]) == 2
    assert "say with --data on what to train it" in capsys.readouterr().err
    other = shutil.copytree(origins / "export", tmp_path / "model")
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(definition))
    assert tune(other, corpus, tmp_path / "none", 0) == 2
    assert "prepared with a tokenizer different from that of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_that_lacks_weights_is_refused(origins, corpus, tmp_path, capsys):
    folder = shutil.copytree(origins / "export", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    remoe.RemoeForCausalLM.from_pretrained(folder).save_pretrained(
        folder, state_dict={name: value for name, value in state.items() if "layers.1.mlp.router" not in name}
    )
    assert tune(folder, corpus, tmp_path / "out", 0) == 2
    assert "lacks weights of the model: model.layers.1.mlp.router.weight" in capsys.readouterr().err
    assert weights(origins / "run").keys() == state.keys()


@pytest.mark.parametrize("kind", ["run", "run of several processes"])
def test_a_changed_weight_changes_the_hashes(origins, tmp_path, kind):
    folder = shutil.copytree(open_origin(origins / kind).folder, tmp_path / "checkpoint")
    origin = replace(open_origin(origins / kind), folder=folder)
    before = origin.hashes()
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert origin.hashes().keys() == before.keys() != set()
    assert origin.hashes() != before
