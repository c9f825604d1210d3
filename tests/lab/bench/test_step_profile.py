"""The profile of a training step sorts operators into kinds of work. No time is tested."""

import json

import pytest
import torch
from torch.profiler import profile, record_function

from remoe.errors import ConfigError
from remoe.experts.cpu.build import compiled_passes
from remoe.lab.bench import step_profile as module
from remoe.lab.bench.step_profile import MARK, SCOPES, marked_scopes, profile_step, times
from remoe.lab.bench.train_step import TrainStepOptions
from remoe.lab.cli.main import main

SMALL = {
    "seq_len": 32,
    "batch_size": 4,
    "micro_batch_size": 2,
    "num_experts": 4,
    "model": {"hidden_size": 32, "num_hidden_layers": 2},
}


def test_every_kind_of_work_has_a_share(corpus):
    ours = ("remoe relu",)
    options = TrainStepOptions("tiny", str(corpus), steps=2, warm_up=2, biased=True, contestants=ours, config=SMALL)
    found = profile_step(options)
    rows = {row["name"]: row for row in found.rows}
    passes = compiled_passes(torch.float32) is not None
    for name in module.CATEGORIES:
        assert name in rows or (name == module.EXPERT_PRODUCTS and not passes), name
        assert rows[name]["ms_per_step"] > 0
    assert sum(row["share"] for row in found.rows) == pytest.approx(1)
    assert sum(row["ms_per_step"] for row in found.rows) == pytest.approx(found.details["ms_per_step"])
    needed = sum(rows[name]["share"] for name in module.NEEDED if name in rows)
    assert found.details["share_of_rest"] == pytest.approx(1 - needed)
    assert found.details["sparsity"] == pytest.approx(0.75, abs=0.05)  # without the steps that it takes to settle
    assert "aten::_fused_adamw_" in rows["optimiser"]["operators"]
    json.dumps(found.details)


def test_gradients_count_where_their_operators_were_recorded():
    a, b = torch.randn(300, 300, requires_grad=True), torch.randn(300, 300)
    with profile() as profiled, record_function(MARK + module.REST):
        with record_function(MARK + module.NORMS):
            c = a.sin()
        d = (c @ b).exp()
        with record_function(MARK + module.LOSS):
            loss = d.tanh().sum()
        loss.backward()
    seconds, operators = times(profiled.events())
    assert {"aten::sin", "aten::cos"} <= operators[module.NORMS].keys()
    assert {"aten::tanh", "aten::tanh_backward", "aten::sum"} <= operators[module.LOSS].keys()
    assert "aten::exp" in operators[module.REST]
    assert [kind for kind, names in operators.items() if "aten::mm" in names] == [module.PRODUCTS]
    assert seconds[module.NORMS] == pytest.approx(sum(operators[module.NORMS].values()))


def test_marks_are_taken_away():
    from importlib import import_module

    owners = [getattr(import_module(m), name) if method else import_module(m) for m, name, method in SCOPES]
    names = [method or name for _, name, method in SCOPES]
    before = [dict(vars(owner)) for owner in owners]
    with marked_scopes():
        changed = [getattr(owner, name) for owner, name in zip(owners, names, strict=True)]
    assert all(hasattr(function, "__wrapped__") for function in changed)
    assert [dict(vars(owner)) for owner in owners] == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contestants": ("remoe relu", "remoe topk")}, "--profile takes one contestant"),
        ({"contestants": ("mixtral eager",)}, "--profile takes one contestant"),
        ({"contestants": ("remoe relu",), "config": {"compile": True}}, "without --compile"),
    ],
)
def test_bad_options_are_named(corpus, options, words):
    with pytest.raises(ConfigError, match=words):
        profile_step(TrainStepOptions(data=str(corpus), **options))


def test_the_command_prints_a_table_and_writes_the_json(tmp_path, monkeypatch, capsys):
    row = {"name": "norms", "ms_per_step": 2.5, "share": 0.25, "operators": {"aten::mul": 1.5}}
    details = {"contestant": "remoe relu", "ms_per_step": 10.0, "share_of_rest": 0.25}
    monkeypatch.setattr(module, "profile_step", lambda options: module.StepProfile([row], details))
    assert main(["bench", "train-step", "--profile", "--out", str(tmp_path / "profile.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "norms 2.50 25.0% aten::mul 1.50" in out
    assert "attention's core: 25.0%" in out
    assert json.loads((tmp_path / "profile.json").read_text())["rows"] == [row]
