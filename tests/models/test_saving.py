"""The umask decides the mode of every file that a model is saved in."""

import os
import stat
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import remoe
from remoe.models.classification import RemoeForSequenceClassification

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def routed():
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, num_experts=4, k=1))


def classifier():
    return RemoeForSequenceClassification(remoe.RemoeConfig(**SIZES, num_experts=4, k=1, num_labels=2, pad_token_id=0))


def relufied():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    remoe.relufy(model, [torch.arange(32)[None]], max_loss_increase=None)
    return model


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("build", [routed, classifier, relufied])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}], ids=["one file", "shards"])
def test_umask_decides_the_mode_of_each_file(tmp_path, umask, build, options):
    out = tmp_path / "out"
    build().save_pretrained(out, **options)
    found = modes(out)
    assert sum(name.endswith(".safetensors") for name in found) > bool(options)
    assert set(found.values()) == {0o666 & ~umask}


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_files_of_others_keep_their_modes(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"x")
    (tmp_path / "other.safetensors").chmod(0o400)
    routed().save_pretrained(tmp_path)
    assert modes(tmp_path)["other.safetensors"] == 0o400
