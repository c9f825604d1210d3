"""Memory is compared before a run; when it runs out, one line says what to change, and the run goes on with that."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_run import FLAGS

from remoe.errors import CheckpointError, ConfigError
from remoe.lab import memory
from remoe.lab.cli.main import COMMANDS, main
from remoe.lab.memory import check_memory, less_memory, machine_memory, ran_out
from remoe.lab.scaling.memory import rank_memory
from remoe.lab.scaling.shards import Job
from remoe.lab.training import train as training
from remoe.lab.training.build import model_config
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.metrics import read_metrics
from remoe.lab.training.trainer import Trainer
from remoe.models.plan import plan, sizes_of

CPU = torch.device("cpu")
ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("std::bad_alloc"),
]  # fmt: skip


def test_memory_that_runs_out_is_one_line_and_the_run_goes_on_with_smaller_micro_batches(
    corpus, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "a run"
    backward = Trainer._backward

    def too_much(self):
        if self.step == 3 and self.config.micro_batch_size > 1:
            raise ERRORS[2]
        return backward(self)

    monkeypatch.setattr(Trainer, "_backward", too_much)
    flags = ["--steps", "4", "--checkpoint.every", "2", "--validate.max-tokens", "100"]
    assert main(["train", "--data", str(corpus), "--out", str(out), *flags, *FLAGS]) == 2
    message = capsys.readouterr().err
    assert message == (
        "remoe: error: out of memory: --micro-batch-size 1 needs less; continue with: "
        f"remoe train --out '{out}' --resume --micro-batch-size 1\n"
    )
    assert main(["train", "--out", str(out), "--resume", "--micro-batch-size", "1"]) == 0
    assert "micro-batches of 1 sequences from here on, of 2 before: " in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert RunFolder(out).load_config().micro_batch_size == 1
    assert json.loads((out / "summary.json").read_text())["steps"] == 4


def test_what_may_change_on_resuming_is_said(tmp_path, capsys):
    def said(old, new, **options):
        configs = [config_from_dict({"batch_size": 8, **options, **changes}, "test") for changes in (old, new)]
        training._check_unchanged(*configs, RunFolder(tmp_path))
        return capsys.readouterr().out

    smaller = {"micro_batch_size": 8}, {"micro_batch_size": 2}
    assert "may change the run a little" in said(*smaller)
    assert "may change the run a little" in said(*smaller, router="topk", router_options={"load_balance": False})
    plain = said(*smaller, router_options={"load_balance": False})
    assert plain == "micro-batches of 2 sequences from here on, of 8 before: this changes rounding alone\n"
    assert "rounding alone" in said(*smaller, router="dense")
    assert said({"recompute": False}, {"recompute": True}) == ""
    for changes in ({"batch_size": 16}, {"seq_len": 16}, {"num_experts": 4}, {"k": 2}, {"dtype": "bfloat16"}):
        with pytest.raises(CheckpointError, match=f"with --{next(iter(changes)).replace('_', '-')} "):
            said({}, changes)


def test_errors_of_every_other_kind_are_not_taken_for_it():
    assert all(map(ran_out, ERRORS))
    for error in (RuntimeError("shapes do not fit"), RecursionError("maximum recursion depth"), OSError("disk")):
        assert not ran_out(error)


def test_other_commands_are_one_line_too(capsys, monkeypatch):
    def command(argv):
        raise error

    monkeypatch.setitem(sys.modules, "hungry", SimpleNamespace(command=command))
    monkeypatch.setitem(COMMANDS, "hungry", ("hungry", "command", ""))
    for error in ERRORS:  # noqa: B007 - the command raises it
        assert main(["hungry"]) == 2
        assert capsys.readouterr().err.startswith("remoe: error: out of memory: smaller sizes, such as --batch-size")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_is_compared_with_the_machine(monkeypatch, recompute):
    config = config_from_dict({"micro_batch_size": 8, "recompute": recompute}, "test")
    sizes = sizes_of(model_config(config, config.vocab_size, 0))
    planned = plan(model_config(config, config.vocab_size, 0), 256, 8)

    def said(total, free):
        monkeypatch.setattr(memory, "machine_memory", lambda device: (total, free))
        return check_memory(config, sizes, CPU)

    most = planned.state_bytes + planned.dense_stage_activation_bytes
    assert said(2 * most, most) is None
    if recompute:
        assert said(2 * most, (planned.state_bytes + most) // 2) is None
    words = said(2 * most, planned.state_bytes)
    assert words.endswith(" are free: --micro-batch-size 1 needs less")  # nothing is free for activations
    half = (planned.state_bytes + most) // 2
    if not recompute:  # a quarter of the batch, and the head's gradient, which does not depend on it
        assert " are free: --micro-batch-size 2 needs less" in said(2 * most, half)
    with pytest.raises(ConfigError, match=r"gradients and optimiser of this model take 0\.1 GiB, and this machine has"):
        said(planned.state_bytes - 1, 10)
    monkeypatch.setattr(memory, "machine_memory", lambda device: None)
    assert check_memory(config, sizes, CPU) is None


def test_what_needs_less_memory_can_be_given():
    def option(**options):
        return less_memory(config_from_dict(options, "test"))

    assert option(batch_size=12, micro_batch_size=12) == "--micro-batch-size 6"
    assert option(batch_size=12, micro_batch_size=4) == "--micro-batch-size 3"
    assert option(micro_batch_size=1) == "--recompute"
    assert option(micro_batch_size=1, recompute=True) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_machine_has_memory(monkeypatch):
    total, free = machine_memory(CPU)
    assert 2**28 < free <= total < 2**50
    monkeypatch.setattr("resource.getrlimit", lambda which: (2**27, 2**28))
    assert machine_memory(CPU) == (2**27, 2**27)


def test_a_model_beyond_the_machine_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--batch-size", "1000000000000"]) == 2
    assert "the tokens of one step alone take" in capsys.readouterr().err
    assert main(["train", "--model.num-hidden-layers", "100000000"]) == 2
    assert "choose a smaller model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_on_several_processes_is_compared_with_the_memory_of_each(monkeypatch, device):
    config = config_from_dict({"mesh": "fsdp=4", "batch_size": 16, "micro_batch_size": 4, "dtype": "float32"}, "test")
    sizes, mesh = sizes_of(model_config(config, config.vocab_size, 0)), Mesh(fsdp=4)
    job = Job(sizes, mesh, config.seq_len, 16, 4, on_gpu=device == "cuda")
    of_rank = rank_memory(job, 0.5)  # in the dense stage
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share = 4 if device == "cpu" else 1  # of main memory each process has a quarter, and a GPU of its own

    def said(free, total=2**40):
        monkeypatch.setattr(memory, "machine_memory", lambda device: (share * total, share * free))
        return check_memory(config, sizes, torch.device(device), mesh)

    assert said(of_rank.peak) is None
    assert " are free: --micro-batch-size 2 needs less" in said(of_rank.peak - 1)
    kept = of_rank.weights + of_rank.gradients + of_rank.moments
    with pytest.raises(ConfigError, match=r"and each process has 0\.0 GiB"):
        said(0, kept - 1)
