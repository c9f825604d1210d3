"""Processes that torchrun restarts continue the run that their predecessors began, and no other one."""

import pytest
from tiny_run import FLAGS

from remoe.errors import ConfigError
from remoe.lab.cli.main import main
from remoe.lab.training.checkpoint import list_checkpoints
from remoe.lab.training.elastic import launch


@pytest.fixture
def torchrun(monkeypatch):
    def start(name, restart=0):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    return start


def test_a_restarted_process_continues_the_run_of_its_torchrun_alone(corpus, tmp_path, torchrun, capsys):
    out = tmp_path / "run"
    command = ["train", "--data", str(corpus), "--out", str(out), "--steps", "4", *FLAGS, "--checkpoint.every", "2"]
    torchrun("one", restart=1)  # it was killed before there was a folder
    assert main(command) == 0
    (out / "summary.json").unlink()
    list_checkpoints(out / "checkpoints")[-1].rename(tmp_path / "later")
    torchrun("one")
    assert main(command) == 2
    torchrun("another", restart=1)
    assert main(command) == 2
    assert capsys.readouterr().err.count("already holds a run") == 2
    torchrun("one", restart=2)
    assert main(command) == 0
    assert "resumed at step 2" in capsys.readouterr().out


def test_the_run_must_have_a_name(torchrun, capsys):
    torchrun("one")
    assert main(["train", *FLAGS]) == 2
    assert "torchrun --max-restarts needs --out RUN" in capsys.readouterr().err


def test_the_name_of_a_launch(torchrun, monkeypatch):
    assert launch() is None
    torchrun("job 7")
    assert launch() == "job 7"
    torchrun("none")
    alone = launch()
    assert alone
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch() == alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--rdzv-id"):
        launch()
