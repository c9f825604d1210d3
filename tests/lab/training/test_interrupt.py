"""Signals, closed terminals and outputs that take no more: a run is saved and goes on where it was."""

import os
import pty
import shlex
import signal
import subprocess
import sys

import forked
import pytest
from whole_run import arguments, same_run, start, steps_recorded, train, wait_for

from remoe.lab.training.checkpoint import list_checkpoints


@pytest.mark.skipif(os.name != "posix", reason="processes and signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_its_number(corpus, uninterrupted, tmp_path, number):
    out = tmp_path / "stopped"
    process = start(arguments(corpus, out, "--checkpoint.every", "1000"), tmp_path)
    wait_for(lambda: steps_recorded(out) >= 3, process)
    process.send_signal(number)
    process.wait(60)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 128 + number, errors
    assert "--resume" in (tmp_path / "output").read_text()
    assert "stopping after this step" in errors
    assert list_checkpoints(out / "checkpoints")
    assert train(corpus, out, "--resume") == 0
    same_run(uninterrupted, out)


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_closed_terminal_saves_and_stops(corpus, uninterrupted, tmp_path):
    """Whatever is printed then is an error of the system, without a signal if the terminal is not the session's own."""
    out = tmp_path / "stopped"
    ours, terminal = pty.openpty()
    argv = arguments(corpus, out, "--checkpoint.every", "1000", "--print-every", "1")
    process = forked.starter().start(argv, os.environ, stdout=terminal, stderr=terminal)
    os.close(terminal)
    wait_for(lambda: os.read(ours, 1 << 16) and steps_recorded(out) >= 3, process)
    os.close(ours)
    assert process.wait(60) == 141
    assert list_checkpoints(out / "checkpoints")
    assert train(corpus, out, "--resume") == 0
    same_run(uninterrupted, out)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize(("encoding", "closed"), [("ascii", ""), ("utf-8", ">&- 2>&-")])
def test_no_output_loses_a_run(corpus, uninterrupted, tmp_path, encoding, closed):
    out = tmp_path / "r\u00e9sum\u00e9"  # the end of a run prints this name
    command = shlex.join([sys.executable, "-m", "remoe", *arguments(corpus, out)])
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (b"r\\xe9sum\\xe9" in done.stdout) == (encoding == "ascii")
    same_run(uninterrupted, out)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_output_saves_and_stops(corpus, uninterrupted, tmp_path, monkeypatch, capsys, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "remoe", *arguments(corpus, out, "--checkpoint.every", "1000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors) == (141, "")
    saved = list_checkpoints(out / "checkpoints")  # none if a line before the first step met the closed pipe
    assert train(corpus, out, "--resume") == 0
    assert ("no checkpoint yet: starting from the beginning" in capsys.readouterr().out) == (not saved)
    same_run(uninterrupted, out)
