"""Training on several processes gives what one process gives, with the same micro-batches."""

import errno
import json
import os
import shutil
from contextlib import redirect_stderr
from functools import partialmethod
from threading import Event

import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks, timeouts
from safetensors.torch import save_file
from torch import nn

from remoe.errors import CheckpointError, RemoeError
from remoe.lab.cli.main import main
from remoe.lab.data import open_dataset
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
from remoe.models.sharding import blocks, local

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")]

STEPS = 6
FEW = {"steps": 2, "checkpoint": {"every": 2}, "validate": {"every": 2, "batch_size": 3}}
OTHERS = {  # where processes read other rows, sparsemixer draws other numbers
    "relu_norm fsdp=2,ep=2": {"router": "relu_norm", **FEW},
    "relu_scaled fsdp=2,ep=2": {"router": "relu_scaled", **FEW},
    "expert_choice fsdp=2,ep=2": {"router": "expert_choice", **FEW},
    "hash fsdp=2,ep=2": {"router": "hash", **FEW},
    "sparsemixer ep=2,tp=2": {"router": "sparsemixer", **FEW},
    "lory fsdp=2": {"router": "lory", **FEW},
    "dense fsdp=2": {"router": "dense", **FEW},
    "dense_wide tp=2": {"router": "dense_wide", **FEW},
}
RUNS = OTHERS | {  # options; with 8 sequences in a step, two processes have two micro-batches of two each
    "relu fsdp=2,ep=2": {},
    "topk fsdp=2,ep=2": {"router": "topk", "k": 2, "recompute": True, **FEW},
    "sigmoid fsdp=2": {"router": "sigmoid", **FEW},
    "threshold fsdp=2,ep=2": {"router": "threshold", "compile": True, **FEW},
    "balanced-relu fsdp=2,ep=2": {"sparsity": {"lambda_init": 0.1}, "recompute": True, **FEW},
    "balanced-topk fsdp=2": {"router": "topk", "recompute": True, **FEW},
    "closed-relu fsdp=2,ep=2": FEW,
    "bfloat16-relu fsdp=2,ep=2": {"dtype": "bfloat16", **FEW},
    "few-relu fsdp=2": FEW,
}
GLOBAL = {"mesh_load": "global"}  # of the balanced one: two micro-batches, each equal to one of 4 on one process
WIDE = {  # four processes
    "few-relu replicate=2,fsdp=2,ep=2": FEW,
    "few-relu fsdp=2,tp=2": FEW,
    "few-relu fsdp=2,ep=4,tp=2": {"recompute": True, **FEW},
    "topk fsdp=2,ep=4,tp=2": {"router": "topk", "k": 2, **FEW},
    "sigmoid replicate=2,fsdp=2,ep=2": {"router": "sigmoid", **FEW},
    "threshold fsdp=4,ep=2": {"router": "threshold", **FEW},
}
RELU = "relu fsdp=2,ep=2"
BFLOAT16 = {"lm_loss": 1e-4, "loss": 1e-4, "validation_loss": 1e-4}  # relative; others 2e-2, as gates near 0 differ


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
    if out.name.startswith("closed"):
        close(trainer.model)
    trainer.train()
    return trainer


@torch.no_grad()
def close(model):
    """Routes no token of the first layer, and those of the second one to expert 0 alone; a gate that is 0 stays so."""
    for layer, open_experts in zip(model.model.layers, (0, 1), strict=True):
        for ((first, _), *_), weight_ED in blocks(layer.mlp.router.weight):
            weight_ED[max(open_experts - first, 0) :] = 0


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
        # of the first mesh: torch takes groups of earlier ones for parts of the others
        assert state or timeouts() == {trainer.ranks.timeout}
        state[name] = trainer.model.sparsity.lam.item(), trainer.model.sparsity.sparsity.item()
    torch.save(state, folder / f"state-{rank}.pt")
    _saving(rank, trainer)
    if rank == 1:
        trainer.model.sparsity.lam *= 1 + 1e-6
    with pytest.raises(RemoeError, match=f"step {trainer.step}: lambda, S or the state of a router of rank 1 differs"):
        trainer.save()
    error, words = (CheckpointError, "full") if rank == 0 else (RemoeError, "because rank 0 failed")
    with pytest.raises(error, match=words):
        _fail_on_rank_0(trainer.ranks)


def _saving(rank, trainer):
    """A checkpoint is of the step at which it was begun, and a rank that cannot write its part stops all."""
    run, step, may_write = trainer.run, trainer.step, Event()
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
    assert [path.name for path in trainer.run.checkpoints.iterdir()] == [f"step-{step:08}"]
    trainer.run, trainer.step = run, step


def _full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_and_saved(data, source, target, mesh):
    """Reads the newest checkpoint of a run on a mesh, and saves what was read."""
    config = options(RELU, data, mesh=mesh, resume=True)
    trainer = Trainer(config, open_dataset(data), RunFolder(source), Ranks(mesh_of(config), "cpu"))
    trainer.resume()
    trainer.run = RunFolder(target)
    trainer.save()
    trainer.saving.wait()
    return trainer


def _eight(rank, folder, data):
    """On each process one sequence of a batch; some of them have no part of a router's weight."""
    few = {"steps": 4, "checkpoint": {"every": 2}, "validate": {"every": 4}}
    train(options(RELU, data, mesh="fsdp=8", micro_batch_size=1, **few, **GLOBAL), folder / "eight")


def _resumed(rank, folder, data):
    """Runs of one, four and eight processes, and a damaged one of two, go on with two."""
    for name in ("wide", "eight"):
        _read_and_saved(data, folder / name, folder / f"{name} again", "fsdp=2")
    more = ["--resume", "--mesh", "fsdp=2", "--micro-batch-size", "4"]  # the whole batch at once, as on eight
    assert main(["train", "--out", str(folder / "eight"), *more]) == 0
    trainer = _read_and_saved(data, folder / "resumed", folder / "again", "fsdp=2,ep=2")
    assert trainer.step == STEPS // 2
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
    assert run_training(trainer.config, RunFolder(folder / "resumed"), options(RELU, data)) == 0
    with (folder / f"errors-{rank}").open("w") as file, redirect_stderr(file):
        assert main(["train", "--out", str(folder / "damaged"), "--resume", "--mesh", "fsdp=2,ep=2"]) == 0


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        load = {**GLOBAL, "micro_batch_size": 4} if name.startswith("balanced") else {}
        train(options(name, corpus, recompute=False, compile=False, **load), folder / name.split()[0])
    return folder


@pytest.fixture(scope="module")
def together(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    run_ranks(_on_ranks, folder, corpus, list(RUNS))
    return folder


def check_equal_courses(one, several, steps=STEPS, bfloat16=False):
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (one, several))
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    for ours, record in zip(found, expected, strict=True):
        for name in {"lm_loss", "loss", "reg_loss", "lambda", "sparsity", "validation_loss"} & record.keys():
            rel = BFLOAT16.get(name, 2e-2) if bfloat16 else 1e-5
            assert ours[name] == pytest.approx(record[name], rel=rel), name
        assert ours["grad_norm"] == pytest.approx(record["grad_norm"], rel=2e-2 if bfloat16 else 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(alone, together, name):
    steps, bfloat16 = RUNS[name].get("steps", STEPS), name.startswith("bfloat16")
    check_equal_courses(alone / name.split()[0], together / name, steps, bfloat16)
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


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("bfloat16")])
def test_a_checkpoint_is_that_of_one_process(alone, together, name):
    check_equal_checkpoints(alone / name.split()[0], together / name)


def test_layers_and_experts_without_tokens_have_zero_gradients(together):
    run = together / "closed-relu fsdp=2,ep=2"
    layers_LE = read_metrics(run / "metrics.jsonl")[-1]["load_per_expert"]
    assert layers_LE[0] == [0] * 4
    assert layers_LE[1][0] > 0
    assert layers_LE[1][1:] == [0] * 3
    _, training = stored(RunFolder(run).last_checkpoint())
    for name in ("gate_up_proj", "down_proj"):
        first, second = (training[f"model.layers.{layer}.mlp.experts.{name}.exp_avg_sq"] for layer in range(2))
        assert not first.any()
        assert second[0].any()
        assert not second[1:].any()


def test_the_commands_read_a_run_of_two_processes(together, tmp_path, capsys):
    run, out = together / RELU, tmp_path / "exported"
    assert main(["export", str(run), str(out)]) == 0
    weights, _ = stored(RunFolder(run).last_checkpoint())
    exported = RemoeForCausalLM.from_pretrained(out).state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], value) for name, value in weights.items())
    assert main(["eval", str(run), "--json", str(tmp_path / "eval.json")]) == 0
    loss = json.loads((tmp_path / "eval.json").read_text())["all"]["loss"]
    assert loss == pytest.approx(read_metrics(run / "metrics.jsonl")[-1]["validation_loss"], rel=1e-5)
    capsys.readouterr()
    texts = []
    for model in (run, out):
        assert main(["generate", str(model), "--prompt", "cow", "--max-new-tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "cow\n"
    assert main(["report", str(run), "--out", str(tmp_path / "report.html"), "--max-tokens", "500"]) == 0
    assert (tmp_path / "report.html").exists()


def damaged_copy(run, target):
    """A copy of a run of two processes in whose newest checkpoint one byte of a shard is another one."""
    shutil.copytree(run, target)
    shard = list_checkpoints(target / "checkpoints")[-1] / "shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return f"{shard} is damaged"


def check_said(text, damaged, run):
    (line,) = [line for line in text.splitlines() if damaged in line]
    before = list_checkpoints(run / "checkpoints")[0]
    assert line.endswith(f"this checkpoint is left out; the newest whole one is {before}")


def check_same_tensors(one, several):
    for found, expected in zip(stored(several), stored(one), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_run_of_two_processes_with_a_damaged_shard_goes_on_with_one(corpus, alone, together, tmp_path, caplog):
    run = tmp_path / "run"
    damaged = damaged_copy(together / RELU, run)
    assert run_training(options(RELU, corpus, resume=True), RunFolder(run), options(RELU, corpus)) == 0
    check_said(caplog.text, damaged, run)
    check_equal_courses(alone / "relu", run)


def test_runs_of_one_two_four_and_eight_processes_go_on_with_two(corpus, alone, together, wide, eight, tmp_path):
    for before, name in ((alone / "relu", "resumed"), (eight, "eight")):
        shutil.copytree(before, tmp_path / name)
        shutil.rmtree(list_checkpoints(tmp_path / name / "checkpoints")[-1])
    shutil.copytree(wide / "few-relu fsdp=2,ep=4,tp=2", tmp_path / "wide")
    damaged = damaged_copy(together / RELU, tmp_path / "damaged")
    run_ranks(_resumed, tmp_path, corpus)
    read = {"again": alone / "relu", "wide again": wide / "few-relu fsdp=2,ep=4,tp=2", "eight again": eight}
    for again, before in read.items():
        ours = list_checkpoints(tmp_path / again / "checkpoints")[0]
        check_same_tensors(before / "checkpoints" / ours.name, ours)  # what was read is written, bit for bit
    for run in ("resumed", "damaged"):
        check_equal_courses(alone / "relu", tmp_path / run)
        assert (tmp_path / run / "summary.json").exists()
    check_equal_courses(eight, tmp_path / "eight", steps=4)
    check_said((tmp_path / "errors-0").read_text(), damaged, tmp_path / "damaged")


@pytest.fixture(scope="module")
def eight(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    run_ranks(_eight, folder, corpus, world_size=8)
    return folder / "eight"


@pytest.fixture(scope="module")
def wide(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    run_ranks(_on_ranks, folder, corpus, list(WIDE), world_size=4)
    return folder


@pytest.mark.parametrize("name", WIDE)
def test_four_processes_train_as_one_does(alone, wide, name):
    check_equal_courses(alone / name.split()[0], wide / name, FEW["steps"])
    check_equal_checkpoints(alone / name.split()[0], wide / name)
