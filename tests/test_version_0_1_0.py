"""What version 0.1.0 wrote goes on loading: a run, which also goes on training, and an export."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from remoe import RemoeForCausalLM
from remoe.lab.cli.main import main
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_run
from remoe.lab.training.metrics import read_metrics

ARCHIVE = Path(__file__).parent / "fixtures" / "version-0.1.0.tar.xz"
# Between processors the last digits of float32 sums differ.
TOLERANCE = {"rel": 1e-5, "abs": 1e-7}


@pytest.fixture(scope="module")
def expected(unpacked) -> dict:
    """What 0.1.0 computed from these files."""
    return json.loads((unpacked / "expected.json").read_text())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("version-0.1.0")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def resumed(unpacked) -> Path:
    """The run, which was stopped at step 4 of 8, trained to its end."""
    run = unpacked / "run"
    written = yaml.safe_load((run / "config.yaml").read_text())  # options that have another name or place today
    assert {"load_balance", "max_experts_per_token", "experts_backend"} <= written["model"].keys()
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert main(["train", "--out", str(run), "--resume", "--data", str(unpacked / "data")]) == 0
    return run


def test_a_run_is_trained_to_its_end_as_0_1_0_would_have(resumed, expected):
    found = read_metrics(resumed / "metrics.jsonl")
    assert [record["step"] for record in found] == list(range(1, 9))
    for ours, theirs in zip(found[4:], expected["metrics_of_steps_5_to_8"], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, **TOLERANCE)


def test_its_options_stand_under_todays_names_afterwards(resumed):
    config = RunFolder(resumed).load_config()
    assert config.router_options == {"load_balance": False, "max_experts_per_token": 4}
    assert "load_balance" not in vars(config.model)
    assert (config.experts_per_layer, config.active_per_token) == (8, 2)


def test_its_options_cannot_be_changed(resumed, capsys):
    flags = ["--router-options", "load_balance", "true", "max_experts_per_token", "4"]
    assert main(["train", "--out", str(resumed), "--resume", *flags]) == 2
    assert "--router-options.load-balance True: it was started with False" in capsys.readouterr().err


def test_text_is_generated_from_it(resumed, capsys):
    model, _, _ = load_run(resumed)
    router = model.model.layers[0].mlp.router
    assert (router.load_balance, router.max_experts_per_token) == (False, 4)
    assert main(["generate", str(resumed), "--prompt", "one", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("one")


def test_an_export_gives_the_same_logits(unpacked, expected):
    model = RemoeForCausalLM.from_pretrained(unpacked / "export").eval()
    input_ids = torch.tensor([expected["input_ids"]])
    with torch.no_grad():
        out = model(input_ids, labels=input_ids)
    last = out.logits[0, -1]
    torch.testing.assert_close(last, torch.tensor(expected["logits_last"])[: len(last)], rtol=1e-4, atol=1e-5)
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert out.reg_loss.item() == pytest.approx(expected["reg_loss"], rel=1e-5)
