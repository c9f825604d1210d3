"""The benchmark of LoRA runs, and the adapters on the pairs need no memory per expert. No time is tested."""

import json

import pytest
import torch

from remoe.lab.bench import roofline
from remoe.lab.bench.layer import Case
from remoe.lab.bench.roofline import Roofline
from remoe.lab.cli.main import main

pytest.importorskip("peft")
from remoe.lab.bench import lora


def test_the_command_prints_a_table_and_writes_the_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora, "CASES", (Case(20, 16, 8, 4, 1), Case(20, 16, 8, 6, 1), Case(20, 16, 8, 8, 1)))
    monkeypatch.setattr(roofline, "measure_roofline", lambda device, dtype: Roofline(1, 1, 1))
    out = tmp_path / "lora.json"
    assert main(["bench", "lora", "--quick", "--rank", "2", "--out", str(out)]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "/ PEFT" in shown
    assert [row["E"] for row in written["rows"]] == [4, 6]
    for row in written["rows"]:
        assert set(row["milliseconds"]) == {lora.FROZEN, lora.PEFT, lora.PAIRS}
        assert row["ratio_to_peft"][lora.PEFT] == 1
        assert row["adapter_megabytes"] == pytest.approx(row["E"] * 2 * (16 + 16 + 8 + 16) * 4 / 1e6)
    assert main(["bench", "diff", str(out), str(out)]) == 0


def test_memory_of_a_step_does_not_grow_with_the_experts_but_for_the_adapters():
    row = {E: lora.bench_lora(Case(64, 64, 32, E, 2), 2, torch.device("cpu"), torch.float32, 1) for E in (8, 64)}
    growth = {
        name: row[64]["peak_megabytes"][name] - row[8]["peak_megabytes"][name] for name in row[8]["peak_megabytes"]
    }
    adapters = row[64]["adapter_megabytes"] - row[8]["adapter_megabytes"]
    beside_frozen = growth[lora.PAIRS] - growth[lora.FROZEN]
    assert beside_frozen < 4 * adapters  # both gradients, and b once more in each pass
    weights = (64 - 8) * 3 * 64 * 32 * 4 / 1e6
    assert growth[lora.PEFT] - growth[lora.FROZEN] > weights


@pytest.mark.parametrize("option", ["rank", "repetitions"])
def test_numbers_below_one_are_refused(option, capsys):
    assert main(["bench", "lora", f"--{option}", "0"]) == 2
    assert f"--{option} must be at least 1" in capsys.readouterr().err
