"""The benchmark of `generate`: all contestants write the same text, with the load that they should have."""

import json

import pytest
import torch

from remoe.lab.bench import generate as module
from remoe.lab.bench import roofline
from remoe.lab.bench.generate import Contestants, Work, bench_generate
from remoe.lab.bench.roofline import Roofline
from remoe.lab.cli.main import main

WORK = Work(64, 24, 8, 2, layers=2, vocab_size=512, prompt_tokens=6, new_tokens=10, cache="dynamic")
OURS = {"remoe relu", "remoe topk", "remoe dense"}
THEIRS = {"mixtral grouped_mm", "mixtral batched_mm", "mixtral eager"}


def contestants(peers=True, work=WORK):
    return Contestants(work, torch.device("cpu"), torch.float32, peers)


def test_all_write_one_text_and_the_figures_fit_together():
    row = bench_generate(contestants(), 3, 2, Roofline(1e9, 1e9, 1e9))
    milliseconds, speed = row["milliseconds"], row["tokens_per_second"]
    assert set(milliseconds) == OURS | THEIRS
    assert all(speed[name] == pytest.approx(1e3 * 3 * 10 / milliseconds[name]) for name in speed)
    assert max(row["ratio_to_fastest_mixtral"][name] for name in THEIRS) == 1
    for name in THEIRS | {"remoe topk"}:
        assert row["experts_per_token"][name] == 2
        assert 2 <= row["active_experts"][name] <= 6
    assert row["left_out"] == []
    json.dumps(row)


def test_weights_read_are_those_of_active_experts_and_of_all_else_but_the_embedding():
    made = contestants(peers=False)
    text_BS = made.text(2, 16)
    expert, attention_and_norms, head = 4 * 3 * 64 * 24, 4 * (4 * 64 * 64 + 2 * 64), 4 * (512 + 1) * 64
    dense = module._load(made, "remoe dense", text_BS)
    assert dense.read_bytes == 10 * (2 * (2 * expert + attention_and_norms) + head)
    topk = module._load(made, "remoe topk", text_BS)
    active_LBSE = made.active("remoe topk", text_BS)[:, :, :15]
    experts = active_LBSE[:, :, :6].flatten(1, 2).any(1).sum() + active_LBSE[:, :, 6:].any(1).sum()
    assert topk.read_bytes == 10 * (2 * (attention_and_norms + 4 * 8 * 64) + head) + experts * expert


def test_a_settled_relu_model_opens_each_expert_for_its_share():
    made = contestants(peers=False)
    active_LBSE = made.active("remoe relu", made.text(module.SETTLED_ON, 16))
    share_LE = active_LBSE.float().mean(dim=(1, 2))
    torch.testing.assert_close(share_LE, torch.full((2, 8), 0.25), atol=0.002, rtol=0)


def test_a_slow_contestant_has_one_round_and_one_that_copies_too_much_none(monkeypatch):
    monkeypatch.setattr(module, "SLOW", 0)
    monkeypatch.setattr(module, "MOST_COPIED", 0)
    row = bench_generate(contestants(), 1, 2, Roofline(1e9, 1e9, 1e9))
    assert row["left_out"] == ["mixtral batched_mm"]
    assert set(row["milliseconds"]) == OURS | THEIRS - {"mixtral batched_mm"}
    assert row["spread"] == {}


def test_the_command_prints_tables_and_writes_a_file_that_diff_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure_roofline", lambda device, dtype: Roofline(2e11, 1e11, 3e10))
    sizes = [
        "--d-model",
        "64",
        "--d-ffn",
        "24",
        "--num-experts",
        "4",
        "--k",
        "1",
        "--layers",
        "1",
        "--vocab-size",
        "99",
    ]
    texts = ["--batch-sizes", "1", "2", "9", "--new-tokens", "3", "--cache", "static", "--quick"]
    file = str(tmp_path / "a.json")
    assert main(["bench", "generate", *sizes, *texts, "--out", file]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "generate, batch 2" in out
    assert "generate, batch 9" not in out
    assert "Left out by --quick: transformers' Mixtral" in out
    assert "prompts of 16 tokens, 3 new ones, static cache" in out
    assert main(["bench", "diff", file, file]) == 0
    assert "T, D, F, E, k = 2, 64, 24, 4, 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-sizes", "0"], "--batch-sizes must be at least 1"),
        (["--new-tokens", "1"], "new_tokens must be at least 2"),
        (["--k", "33"], "k = 33 and E = 32"),
    ],
)
def test_bad_sizes_are_one_line(argv, words, capsys):
    assert main(["bench", "generate", *argv]) == 2
    assert words in capsys.readouterr().err
