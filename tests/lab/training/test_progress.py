"""The lines of a run on terminals of every width, and elsewhere."""

import io
import re

import pytest
import torch

from remoe.lab.console import Console
from remoe.lab.training import progress as module
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.speed import Speed
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.plan import flops_per_sequence

RECORD = {
    "lm_loss": 10.97531, "lambda": 1.8e-5, "sparsity": 0.64804, "stage": "sparsifying", "validation_loss": 4.18704,
    "validation_loss_per_domain": {f"a domain {number}": number / 7 for number in range(9)},
}  # fmt: skip


def shown(monkeypatch, options, width=None, record=RECORD, tokens=123_456):
    """What a step's record prints; without a width not on a terminal."""
    terminal = {} if width is None else {"force_terminal": True, "width": width, "color_system": "standard"}
    file = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda: Console(file=file, **terminal))
    config = config_from_dict(options, "test")
    line = ProgressLine(config, 0)
    for _ in range(2):
        line.add(tokens, 1.0)
    line.show(record, config.print_every)
    line.close()
    return file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("router", ["relu", "topk"])
@pytest.mark.parametrize("steps", [40, 500, 60_000, 100_000_000])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_step_is_one_line_of_a_terminal(monkeypatch, router, steps, width):
    lines = plain(shown(monkeypatch, {"steps": steps, "router": router}, width)).splitlines()
    assert all(len(line) <= width for line in lines), lines
    (step,) = [line for line in lines if f"20/{steps}" in line]
    for words in ("loss 10.9753", "0.6480", "sparsifying"):
        assert words in step
    assert ("lambda 1.8" in step) == (router == "relu")
    for number in RECORD["validation_loss_per_domain"].values():
        assert any(f"{number:.3f}" in re.split("[ ()]+", line) for line in lines)  # not broken in two


def test_elsewhere_a_line_is_whole(monkeypatch):
    text = shown(monkeypatch, {"steps": 500})
    assert text.startswith(
        "step     20/500  loss 10.9753  lambda 1.80e-05  sparsity 0.6480  sparsifying  123,456 tokens/s  left 8:00\n"
    )
    assert text.count("\n") == 2
    assert "\x1b" not in text


def test_several_devices_have_their_speed(monkeypatch):
    speed = {"tokens_per_second_per_device": 20.0, "tokens_per_second": 40.0}  # of a slow step
    speed |= {"mfu": 0.3456, "exchange_share": 0.118}
    text = shown(monkeypatch, {"steps": 500}, record=RECORD | speed)
    assert "123,456 tokens/s (61,728 per device)  MFU 34.6%  exchange 12%  left 8:00\n" in text
    narrow = plain(shown(monkeypatch, {"steps": 500}, 100, RECORD | speed)).splitlines()
    assert all(len(line) <= 100 for line in narrow)


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
def test_mfu_is_flops_over_the_peak_of_all_devices(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    model, cuda = RemoeConfig(vocab_size=64, hidden_size=16, num_attention_heads=2), torch.device("cuda", 0)
    record = Speed(model, Mesh(fsdp=4), cuda, True, batch_size=8, seq_len=32).record(seconds=0.5, sparsity=0.875)
    assert record["tokens_per_second_per_device"] == 8 * 32 / 0.5 / 4
    if name == "NVIDIA H200":
        assert record["mfu"] == pytest.approx(8 * flops_per_sequence(model, 32, 0.125) / 0.5 / (4 * 989.5e12))
    assert record.keys() - {"mfu"} == {"tokens_per_second_per_device"}
    assert ("mfu" in record) == (name == "NVIDIA H200")
    assert "mfu" not in Speed(model, Mesh(fsdp=4), cuda, False, 8, 32).record(0.5, 0.875)
    assert Speed(model, Mesh(), cuda, True, 8, 32).record(0.5, 0.875) == {}


def test_stages_have_colours_where_a_terminal_has_them(monkeypatch):
    found = set()
    for stage in ("dense", "sparsifying", "sparse"):
        text = shown(monkeypatch, {}, 120, RECORD | {"stage": stage})
        found.add(re.search(rf"\x1b\[(\d+)m\s+{stage} ", text)[1])
    assert len(found) == 3
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[\d+m", shown(monkeypatch, {}, 120))
