"""The entry point: `remoe`, `python -m remoe`, and what it says when a package is missing."""

import os
import pty
import signal
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import remoe
from remoe.errors import CheckpointError
from remoe.lab.cli.main import main
from remoe.lab.files import new_folder

# Commands, and a package of the lab that each of them needs first.
NEEDS = [("train", "tyro"), ("plan", "tyro"), ("data check", "rich"), ("train --steps 1", "yaml")]


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "remoe", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"remoe {remoe.__version__}\n")


@pytest.mark.parametrize(("command", "package"), NEEDS)
def test_a_missing_package_is_one_line_that_names_the_extra(command, package):
    code = f"import sys; sys.modules[{package!r}] = None; from remoe.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)
    expected = f"remoe: error: this command needs {package}: pip install 'remoe[lab]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
@pytest.mark.parametrize("command", ["train --data nowhere", "generate nowhere", "eval nowhere"])
def test_a_terminal_shows_at_once_that_libraries_are_loaded(command):
    ours, terminal = pty.openpty()
    argv = [sys.executable, "-m", "remoe", *command.split()]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        assert os.read(ours, 100).startswith(b"loading PyTorch")
        process.kill()
    os.close(ours)


@pytest.mark.parametrize("command", ["report", "eval", "eval --sweep-threshold auto", "eval --tasks piqa"])
def test_a_terminal_shows_what_takes_seconds_and_clears_it(command, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        assert capsys.readouterr().err.endswith(" ...")
        raise CheckpointError("no model")

    for name in ("report.write_report", "evaluation.trained.evaluate_run", "evaluation.sweep.sweep_run",
                 "evaluation.zeroshot.evaluate_model"):  # fmt: skip
        monkeypatch.setattr(f"remoe.lab.{name}", fails)
    monkeypatch.setattr("remoe.lab.evaluation.zeroshot.load_tasks", lambda *_: {})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*command.split(), str(tmp_path)]) == 2
    before, error = capsys.readouterr().err.split("\r\033[K")
    assert before == ""
    assert "no model" in error


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_folder_behind(monkeypatch, tmp_path, number):
    def export(*_, **__):
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), number)
            time.sleep(60)

    monkeypatch.setattr("remoe.lab.export.export_run", export)
    with pytest.raises(SystemExit) as stop:
        main(["export", "run", str(tmp_path / "out")])
    assert stop.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_module_of_our_own_that_is_missing_is_a_defect(monkeypatch):
    for name in ("remoe.lab.generation", "remoe.lab.cli.generate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "remoe.lab.generation", None)
    with pytest.raises(ModuleNotFoundError):
        main(["generate", "run"])


def test_what_is_installed_as_a_command_exists():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["remoe"].partition(":")
    assert getattr(import_module(module), function) is main
