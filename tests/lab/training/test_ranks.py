"""Training on several processes gives what one process gives, with the same micro-batches."""

import errno
import os
import shutil
from functools import partialmethod
from threading import Event

import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn

from remoe.errors import CheckpointError, RemoeError
from remoe.lab.data import open_dataset
from remoe.lab.export import export_run
from remoe.lab.training import saving
from remoe.lab.training.checkpoint import list_checkpoints, newest_whole, verify
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import mesh_of
from remoe.lab.training.metrics import read_metrics
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.shards import opened, read_model
from remoe.lab.training.train import run_training
from remoe.lab.training.trainer import Trainer
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.sharding import local

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")]

STEPS = 6
RUNS = {  # options; with 8 sequences in a step, two processes have two micro-batches of two each
    "relu fsdp=2,ep=2": {},
    "topk fsdp=2,ep=2": {"router": "topk", "k": 2, "recompute": True},
    "sigmoid fsdp=2": {"router": "sigmoid"},
    "threshold fsdp=2,ep=2": {"router": "threshold", "compile": True},
    "balanced-relu fsdp=2,ep=2": {"sparsity": {"lambda_init": 0.1}},
    "balanced-topk fsdp=2": {"router": "topk", "recompute": True},
}
GLOBAL = {"mesh_load": "global", "micro_batch_size": 4}  # of the last two: equal to one micro-batch of 8
WIDE = {  # four processes
    "relu replicate=2,fsdp=2,ep=2": {},
    "relu fsdp=2,tp=2": {},
    "relu fsdp=2,ep=4,tp=2": {"recompute": True},
}


def options(name, data, **changed):
    model = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"seq_len": 16, "batch_size": 8, "micro_batch_size": 2, "num_experts": 4, "steps": STEPS, "device": "cpu"}
    common |= {"validate": {"every": 3, "batch_size": 3}, "checkpoint": {"every": 3}, "data": str(data)}
    common |= {"mesh_load": "official"}
    return config_from_dict({**common, "model": model, **(RUNS | WIDE)[name], **changed}, "test")


def train(config, out):
    ranks, run, dataset = Ranks(mesh_of(config), "cpu"), RunFolder(out), open_dataset(config.data)
    trainer = Trainer(config, dataset, run, ranks)
    if ranks.first:
        run.create(config, dataset.tokenizer_path)
    trainer.train()
    return trainer


def _fail_on_rank_0(ranks):
    with ranks.together():
        if ranks.first:
            raise CheckpointError("the disk is full")


def _on_ranks(rank, folder, data, names):
    state = {}
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # the default one compiles C++ first
    for name in names:
        load = GLOBAL if name.startswith("balanced") else {}
        trainer = train(options(name, data, mesh=name.split()[1], **load), folder / name)
        assert (trainer.model.model.layers[0].self_attn._compiled_call_impl is not None) == trainer.config.compile
        assert trainer.model._fuses_loss() == ("tp=" not in name)  # no process holds the logits
        state[name] = trainer.model.sparsity.lam.item(), trainer.model.sparsity.sparsity.item()
    torch.save(state, folder / f"state-{rank}.pt")
    _saving(rank, trainer)
    if rank == 1:
        trainer.model.sparsity.lam *= 1 + 1e-6
    with pytest.raises(RemoeError, match=f"step {STEPS}: lambda, S or the state of a router of rank 1 differs"):
        trainer.save()
    error, words = (CheckpointError, "full") if rank == 0 else (RemoeError, "because rank 0 failed")
    with pytest.raises(error, match=words):
        _fail_on_rank_0(trainer.ranks)


def _saving(rank, trainer):
    """A checkpoint is of the step at which it was begun, and a rank that cannot write its part stops all."""
    run, may_write = trainer.run, Event()
    expected, _ = stored(run.last_checkpoint())
    trainer.run = RunFolder(run.path.with_name("saving"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "save_file", lambda *arguments: may_write.wait(60) and save_file(*arguments))
        trainer.save()
        trainer.saving.poll()
        assert trainer.run.last_checkpoint() is None
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                local(parameter).add_(1)
        may_write.set()
        trainer.saving.wait()
        trainer.ranks.wait()
        found, _ = stored(trainer.run.last_checkpoint())
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        trainer.ranks.wait()
        if rank == 1:
            patch.setattr(saving, "save_file", _full_disk)
        trainer.step += 1
        trainer.save()
        words = "rank 1: .*No space left.*the last good checkpoint is" if rank == 1 else "because rank 1 failed"
        with pytest.raises(RemoeError, match=words):
            trainer.saving.wait()
    assert [path.name for path in trainer.run.checkpoints.iterdir()] == [f"step-{STEPS:08}"]
    trainer.run, trainer.step = run, STEPS


def _full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _resumed(rank, folder, data):
    """A run of one process goes on with two, which first save what they have read."""
    config = options("relu fsdp=2,ep=2", data, mesh="fsdp=2,ep=2", resume=True)
    trainer = Trainer(config, open_dataset(data), RunFolder(folder / "resumed"), Ranks(mesh_of(config), "cpu"))
    trainer.resume()
    assert trainer.step == STEPS // 2
    trainer.run = RunFolder(folder / "again")
    trainer.save()
    trainer.step += 1
    trainer.save()
    trainer.saving.wait()
    first, second = list_checkpoints(trainer.run.checkpoints)
    if rank == 1:  # checks the sum of one file of two
        shard = second / "shard-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    trainer.ranks.wait()
    found, errors = newest_whole(trainer.run.checkpoints, verified=True, ranks=trainer.ranks)
    assert found == first
    assert "shard-00001-of-00002.safetensors is damaged" in str(errors[0])
    assert run_training(config, RunFolder(folder / "resumed"), options("relu fsdp=2,ep=2", data)) == 0


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        whole = {"micro_batch_size": 8} if name.startswith("balanced") else {}
        train(options(name, corpus, recompute=False, compile=False, **whole), folder / name.split()[0])
    return folder


@pytest.fixture(scope="module")
def together(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    run_ranks(_on_ranks, folder, corpus, list(RUNS))
    return folder


def check_equal_courses(one, several):
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (one, several))
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for ours, record in zip(found, expected, strict=True):
        for name in {"lm_loss", "loss", "reg_loss", "lambda", "sparsity", "validation_loss"} & record.keys():
            assert ours[name] == pytest.approx(record[name], rel=1e-5), name
        assert ours["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(alone, together, name):
    check_equal_courses(alone / name.split()[0], together / name)
    for record in read_metrics(together / name / "metrics.jsonl"):
        assert record["tokens_per_second_per_device"] == pytest.approx(record["tokens_per_second"] / 2)
        assert 0 < record.get("exchange_share", 0.5) < 1
        assert ("exchange_share" in record) == ("ep=" in name)
    states = [torch.load(together / f"state-{rank}.pt")[name] for rank in range(2)]
    assert states[0] == states[1]  # lambda and S, bit for bit


def stored(checkpoint):
    """The whole tensors of the model, and those beside it."""
    with opened(checkpoint) as parts:
        return [{name: tensor[...] for name, tensor in part.items()} for part in parts]


def check_equal_checkpoints(one, several):
    ours, expected = (list_checkpoints(folder / "checkpoints")[0] for folder in (several, one))
    verify(ours)
    for found, wanted in zip(stored(ours), stored(expected), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype)
            difference, size = (t.double().norm() for t in (value.double() - wanted[name].double(), wanted[name]))
            assert difference <= 1e-2 * size, name  # Adam amplifies the rounding of gradients near zero
    assert (ours / "config.json").read_text() == (expected / "config.json").read_text()
    weights = read_model(ours).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stored(ours)[0].items())


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_that_of_one_process(alone, together, name):
    check_equal_checkpoints(alone / name.split()[0], together / name)


def test_a_run_of_two_processes_is_exported(together, tmp_path):
    run = together / "relu fsdp=2,ep=2"
    weights, _ = stored(RunFolder(run).last_checkpoint())
    exported = RemoeForCausalLM.from_pretrained(export_run(run, tmp_path / "out")).state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], value) for name, value in weights.items())


def test_a_run_of_two_processes_goes_on_with_one(corpus, alone, together, tmp_path):
    name = "relu fsdp=2,ep=2"
    shutil.copytree(together / name, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    config = options(name, corpus, resume=True)
    assert run_training(config, RunFolder(tmp_path / "run"), options(name, corpus)) == 0
    check_equal_courses(alone / "relu", tmp_path / "run")


def test_a_run_of_one_process_goes_on_with_two(corpus, alone, tmp_path):
    shutil.copytree(alone / "relu", tmp_path / "resumed")
    shutil.rmtree(list_checkpoints(tmp_path / "resumed" / "checkpoints")[-1])
    run_ranks(_resumed, tmp_path, corpus)
    ours = list_checkpoints(tmp_path / "again" / "checkpoints")[0]
    before = list_checkpoints(alone / "relu" / "checkpoints")[0]
    for found, expected in zip(stored(ours), stored(before), strict=True):  # what was read is written, bit for bit
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    check_equal_courses(alone / "relu", tmp_path / "resumed")
    assert (tmp_path / "resumed" / "summary.json").exists()


def test_four_processes_with_replicas_or_tensor_parallelism(corpus, alone, tmp_path):
    run_ranks(_on_ranks, tmp_path, corpus, list(WIDE), world_size=4)
    for name in WIDE:
        check_equal_courses(alone / "relu", tmp_path / name)
        check_equal_checkpoints(alone / "relu", tmp_path / name)
