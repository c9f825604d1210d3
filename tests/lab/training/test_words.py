"""What ends a process of several before its run begins is in `ranks.log`; the processes are imitated one by one."""

import os
import signal

import pytest

from remoe.lab.cli import main as command_line
from remoe.lab.cli.main import main
from remoe.lab.training.words import early_words


@pytest.fixture(autouse=True)
def second_of_two(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def words(log):
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()]


def start(reason):
    return f"rank 1 of 2, step 0: before the run began: {reason}"


def test_a_wrong_option_is_written_beside_a_folder_that_is_not_there(tmp_path, capsys):
    out = tmp_path / "folder" / "run"
    assert main(["train", "--out", str(out), "--steps", "many"]) == 2
    (line,) = words(tmp_path / "folder" / "run-ranks.log")
    assert line.startswith(start(""))
    assert "--steps" in line
    assert line.removeprefix(start("")) in capsys.readouterr().err
    assert not out.exists()  # otherwise the next run could not be written there
    assert main(["train", f"--out={out}", "--mesh", "fsdp=3"]) == 2
    assert words(tmp_path / "folder" / "run-ranks.log")[1].startswith(start("--mesh fsdp=3 needs 3 processes, but 2"))


def test_an_older_run_gets_the_words_of_those_alone_that_continue_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 1\n")
    assert main(["train", "--out", str(run), "--resume", "--batch-size", "x"]) == 2
    assert len(words(run / "ranks.log")) == 1
    assert main(["train", "--out", str(run), "--batch-size", "x"]) == 2
    assert len(words(run / "ranks.log")) == len(words(tmp_path / "run-ranks.log")) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", "--out", str(run), "--batch-size", "x"]) == 2
    assert len(words(run / "ranks.log")) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'safetensors'", name="safetensors"), "No module named 'safetensors'"),
        (ImportError("libgomp.so: cannot be opened"), "libgomp.so: cannot be opened"),
        (MemoryError(), "MemoryError()"),
        (SystemExit(143), "ended by SystemExit(143)"),
    ],
)
def test_a_package_that_is_missing_memory_that_is_and_a_signal(tmp_path, monkeypatch, error, reason):
    def fails(config):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("remoe.lab.training.train.mesh_of", fails)
    try:
        main(["train"])
    except (ImportError, SystemExit):
        assert type(error) in (ImportError, SystemExit)
    assert words(tmp_path / "runs-ranks.log") == [start(reason)]


def test_a_signal_during_an_import_leaves_words(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    frame = type("Frame", (), {"f_code": compile("", "<frozen importlib._bootstrap>", "exec"), "f_back": None})()
    with pytest.raises(SystemExit), early_words(["--out", str(tmp_path / "run")]):
        command_line._handle(signal.SIGTERM, frame)
    assert words(tmp_path / "run-ranks.log") == [start("ended by signal 15")]


def test_a_single_process_has_no_log(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["train", "--out", str(tmp_path / "run"), "--steps", "many"]) == 2
    assert not list(tmp_path.iterdir())
