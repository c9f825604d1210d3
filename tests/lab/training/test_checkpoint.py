"""Resuming is exact, a crash loses nothing, and a bad checkpoint is named."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import FLAGS
from whole_run import STEPS, arguments, same_run, start, steps_recorded, train, wait_for, weights

import remoe
from remoe.errors import CheckpointError
from remoe.lab.cli.main import main
from remoe.lab.data import PrepareOptions, prepare
from remoe.lab.files import locked, temporary_name
from remoe.lab.training.checkpoint import list_checkpoints, load_training_state, save_checkpoint, verify
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.load import load_run


@pytest.mark.skipif(os.name != "posix", reason="processes and signals of POSIX")
@pytest.mark.parametrize("step", [2, 8, 20])
def test_killed_at_any_step_and_resumed_equals_uninterrupted(corpus, uninterrupted, tmp_path, step):
    out = tmp_path / "killed"
    process = start(arguments(corpus, out), tmp_path)
    wait_for(lambda: steps_recorded(out) >= step, process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert steps_recorded(out) < STEPS
    assert train(corpus, out, "--resume", "--checkpoint.every", "5") == 0
    same_run(uninterrupted, out)


def test_retention_keeps_the_newest_and_the_marked(corpus, tmp_path):
    out = tmp_path / "kept"
    train(corpus, out, "--checkpoint.every", "4", "--checkpoint.keep", "2", "--checkpoint.keep-every", "8")
    names = [int(path.name.split("-")[1]) for path in list_checkpoints(out / "checkpoints")]
    assert names == [8, 16, 20, 24]


@pytest.mark.parametrize("left", [".partial-{}", temporary_name("{}")], ids=["0.1.0", "today"])
def test_left_overs_of_a_crash_are_ignored_and_cleaned(corpus, uninterrupted, tmp_path, left):
    out = tmp_path / "crashed"
    train(corpus, out, "--checkpoint.every", "8", "--checkpoint.keep", "9")
    folder = out / "checkpoints"
    for step in (16, 24):  # as a crash while writing step 24, and while deleting step 16, would leave them
        os.rename(folder / f"step-{step:08}", folder / left.format(f"step-{step:08}"))
    (folder / left.format("step-00000024") / "model.safetensors").write_bytes(b"half")
    assert train(corpus, out, "--resume", "--checkpoint.every", "8", "--checkpoint.keep", "9") == 0
    same_run(uninterrupted, out)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000016", "step-00000024"]


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_named_and_left_alone(corpus, uninterrupted, tmp_path, capsys, file):
    out = tmp_path / "damaged"
    train(corpus, out)
    (out / "summary.json").unlink()
    path = list_checkpoints(out / "checkpoints")[-1] / file
    path.write_bytes(path.read_bytes()[:100] if file != "training.json" else b"{")
    before = path.read_bytes()
    assert train(corpus, out, "--resume") == 2
    error = capsys.readouterr().err
    assert path.parent.name in error
    assert len(error.strip().splitlines()) == 1
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def checkpoints(corpus, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 8, 16 and 24 that has no summary yet."""
    out = tmp_path_factory.mktemp("runs") / "three"
    assert train(corpus, out, "--checkpoint.every", "8", "--checkpoint.keep", "9") == 0
    (out / "summary.json").unlink()
    return out


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


PARTS = ["model.safetensors", "training.safetensors", "training.json", "config.json"]


@pytest.mark.parametrize("damage", [*PARTS, "checksums.json", "stray", "empty", "folder"])
def test_the_newest_whole_checkpoint_is_used_and_that_is_said(
    corpus, uninterrupted, checkpoints, tmp_path, caplog, damage
):
    out = shutil.copytree(checkpoints, tmp_path / "run")
    folder, whole = out / "checkpoints", "step-00000016"
    newest = folder / "step-00000024"
    if damage == "stray":
        newest, whole = folder / "step-00000099", "step-00000024"
        newest.mkdir()
    elif damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif damage == "folder":
        (newest / "model.safetensors").unlink()
        (newest / "model.safetensors").mkdir()
    elif damage == "checksums.json":
        (newest / damage).write_text("{")
    else:
        flip_a_bit(newest / damage)
    assert load_run(out)[2] == folder / whole
    assert f"the newest whole one is {folder / whole}" in caplog.text
    assert newest.name in caplog.text
    caplog.clear()
    assert train(corpus, out, "--resume", "--checkpoint.every", "2", "--checkpoint.keep", "1") == 0
    assert f"the newest whole one is {folder / whole}" in caplog.text
    last = folder / "step-00000024"
    assert all(torch.equal(a, weights(uninterrupted)[name]) for name, a in load_file(last / PARTS[0]).items())
    assert len((out / "metrics.jsonl").read_text().splitlines()) == STEPS


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_two_checkpoints_are_not_mixed(checkpoints, tmp_path, capsys, part):
    out = shutil.copytree(checkpoints, tmp_path / "run")
    for step in (16, 24):
        shutil.copy(out / "checkpoints" / "step-00000008" / part, out / "checkpoints" / f"step-{step:08}" / part)
    if part == "config.json":  # equal in all of them
        for step in (16, 24):
            flip_a_bit(out / "checkpoints" / f"step-{step:08}" / part)
    assert load_run(out)[2].name == "step-00000008"
    with pytest.raises(CheckpointError, match=f"{part} is damaged, or of another checkpoint"):
        load_run(out / "checkpoints" / "step-00000024")


def test_another_tokenizer_does_not_belong_to_a_checkpoint(checkpoints, tmp_path):
    out = shutil.copytree(checkpoints, tmp_path / "run")
    copy = shutil.copytree(out / "checkpoints" / "step-00000024", tmp_path / "alone")
    verify(copy)
    flip_a_bit(out / "tokenizer" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged, or of another checkpoint"):
        load_run(out)
    shutil.copy(copy / "model.safetensors", copy / "model-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors does not belong"):
        verify(copy)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-experts", "6"], "--num-experts 6: it was started with 4"),
        (["--router", "topk"], "--router topk: it was started with relu"),
        (["--model.hidden-size", "64"], "--model.hidden-size 64: it was started with 32"),
        (["--seed", "3"], "--seed 3"),
        (["--k", "2"], "--k 2"),
    ],
)
def test_resuming_with_another_architecture_is_refused(corpus, uninterrupted, capsys, flags, words):
    before = weights(uninterrupted)
    assert train(corpus, uninterrupted, "--resume", *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(uninterrupted).items())


def test_a_run_is_never_overwritten(corpus, uninterrupted, capsys):
    before = weights(uninterrupted)
    assert train(corpus, uninterrupted) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in weights(uninterrupted).items())


def test_a_half_started_run_can_be_started_again(corpus, tmp_path):
    out = tmp_path / "half"
    left = tmp_path / temporary_name("half")
    (left / "half" / "tokenizer").mkdir(parents=True)  # as a kill while the folder is made leaves it
    assert train(corpus, out) == 0
    assert not left.exists()


def test_resume_takes_no_configuration_file(corpus, uninterrupted, capsys):
    assert train(corpus, uninterrupted, "--resume", "--config", "other.yaml") == 2
    assert "leave --config out" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is_and_gets_the_report_that_it_lacks(corpus, uninterrupted, tmp_path, capsys):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(corpus, out, "--resume") == 0
    lines = [f"{out}: already finished (24 of 24 steps)", f"summary      {out / 'summary.json'}"]
    assert capsys.readouterr().out.splitlines() == lines
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "summary.json").write_bytes(before[out / "summary.json"][:100])  # as a kill leaves it
    assert train(corpus, out, "--resume") == 0
    assert "\nfinished: 24 steps" in capsys.readouterr().out


def test_time_and_memory_are_those_of_all_processes_of_a_run(corpus, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    state = list_checkpoints(out / "checkpoints")[-1] / "training.json"
    saved = json.loads(state.read_text())
    assert 0 < saved["seconds"] <= json.loads((uninterrupted / "summary.json").read_text())["seconds"]
    state.write_text(json.dumps(saved | {"seconds": 1e6, "peak_memory_bytes": 2**60}))
    (state.parent / "checksums.json").unlink()  # as in version 0.1.0
    (out / "summary.json").unlink()
    assert train(corpus, out, "--resume") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 1e6 < summary["seconds"] < 1.1e6
    assert summary["peak_memory_bytes"] == 2**60


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(corpus, tmp_path):
    """The system refuses to let a file grow, as it does on a full disk: first the checkpoint's weights do not fit."""
    out = tmp_path / "full"
    assert train(corpus, out, "--checkpoint.every", "6") == 0
    for path in list_checkpoints(out / "checkpoints")[1:]:
        path.rename(path.with_name(temporary_name(path.name)))
    kept = list_checkpoints(out / "checkpoints")[-1]
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    resume = ["train", "--data", str(corpus), "--out", str(out), "--resume"]
    process = start(resume, tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    process.wait(120)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 2
    assert f"last good checkpoint is {kept}" in errors
    assert len(errors.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert list((out / "checkpoints").iterdir()) == [kept]


def test_a_run_with_router_options_resumes_and_keeps_them(corpus, tmp_path, capsys):
    flags = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *FLAGS, "--router", "topk"]
    options = ["--router-options", "warmup_k", "2", "warmup_steps", "3"]
    assert main([*flags, "--steps", "4", *options]) == 0
    resume = ["train", "--out", str(tmp_path / "run"), "--resume"]
    assert main([*resume, "--print-every", "1"]) == 0
    assert RunFolder(tmp_path / "run").load_config().router_options == {"warmup_k": 2, "warmup_steps": 3}
    assert main([*resume, "--router-options", "renormalize", "true"]) == 2
    assert "it was started with" in capsys.readouterr().err


def test_a_run_follows_its_data_but_takes_no_other(corpus, tmp_path, capsys):
    out = tmp_path / "my run"
    assert main(["train", "--data", str(corpus), "--out", str(out), "--steps", "2", *FLAGS]) == 0
    assert f"remoe eval '{out}'" in capsys.readouterr().out  # can be typed as printed
    moved = shutil.copytree(corpus, tmp_path / "moved")
    RunFolder(out).summary.unlink()  # as if it had stopped before its end
    more = ["train", "--resume", "--out", str(out)]
    (tmp_path / "other.txt").write_text("quite another text\n" * 400)
    (tmp_path / "held.txt").write_text("held out")
    sources = {"sources": (str(tmp_path / "other.txt"),), "validation": (str(tmp_path / "held.txt"),)}
    tokenizer = str(RunFolder(out).tokenizer)
    other = prepare(PrepareOptions(**sources, out=tmp_path / "other", tokenizer=tokenizer, quiet=True))
    assert main([*more, "--data", str(other)]) == 2
    assert "is not the data" in capsys.readouterr().err
    foreign = prepare(PrepareOptions(**sources, out=tmp_path / "foreign", vocab_size=280, quiet=True))
    shutil.rmtree(RunFolder(out).checkpoints)
    assert main([*more, "--data", str(foreign)]) == 2  # without a checkpoint too
    assert "prepared with a tokenizer different from" in capsys.readouterr().err
    assert main([*more, "--data", str(moved)]) == 0
    assert RunFolder(out).load_config().data == str(moved)
    assert main(["eval", str(out)]) == 0


def test_a_parameter_that_has_had_no_gradient_has_no_state(tmp_path):
    def build():
        sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, num_experts=2))
        model.model.layers[0].mlp.router.spare = torch.nn.Parameter(torch.ones(3))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = build()
    ids = torch.arange(20).view(2, 10)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {"data": "x"}, [0.5])
    again, restored = build()
    load_training_state(path, again, restored)
    assert len(restored.state) == len(optimizer.state) == len([*model.parameters()]) - 1
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        for name, value in optimizer.state.get(a, {}).items():
            assert torch.equal(restored.state[b][name], value)


def test_the_working_directory_is_no_place_for_a_run(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(corpus), "--out", ".", "--steps", "2", *FLAGS]) == 2
    assert "is the working directory" in capsys.readouterr().err


def test_a_checkpoint_is_known_by_any_name(uninterrupted, monkeypatch):
    checkpoint = RunFolder(uninterrupted).last_checkpoint()
    monkeypatch.chdir(checkpoint)
    for name in (".", f"../{checkpoint.name}", checkpoint):
        assert run_of(Path(name)).path == uninterrupted


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_run_that_is_being_trained_is_left_alone(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(corpus, run, "--checkpoint.every", "5") == 0
    (run / "summary.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with locked(run, OSError("busy")):
        capsys.readouterr()
        assert main(["train", "--out", str(run), "--resume"]) == 2
        assert "another process is training this run" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert main(["train", "--out", str(run), "--resume"]) == 0
