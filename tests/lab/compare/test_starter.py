"""Commands that are forked: their output, end, threads and files are those of a process of their own."""

import fcntl
import os
import signal
import sys
import time

import forked
import pytest

from remoe.errors import RemoeError
from remoe.lab.compare.starter import Starter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each command gets a new Python")
TRAIN = ["train", "--device", "cpu", "--steps", "100000", "--data"]


def test_output_folder_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    process = forked.start(["data", "check", "empty"], tmp_path / "output", tmp_path / "errors")
    assert process.wait(60) == 2
    assert process.poll() == 2
    assert (tmp_path / "output").read_text() == ""
    assert (tmp_path / "errors").read_text() == "remoe: error: empty: not a dataset: it has no dataset.json\n"
    assert forked.start(["--version"], tmp_path / "output", tmp_path / "errors").wait(60) == 0


@pytest.mark.slow
def test_a_process_of_its_own(corpus, tmp_path):
    """Its session, threads and environment are its own, it holds what it is given, and outlives what started it."""
    log, lock = tmp_path / "log", tmp_path / "lock"
    argv = [*TRAIN, str(corpus), "--out", str(tmp_path / "run"), "--preset", "tiny"]
    with log.open("wb") as file, lock.open("wb") as held, Starter() as starter:
        fcntl.flock(held, fcntl.LOCK_EX)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        numbers = {"stdout": file.fileno(), "stderr": file.fileno(), "keep_open": [held.fileno()]}
        process = starter.start(argv, environment, **numbers)
    try:
        assert os.getsid(process.pid) == process.pid
        for _ in range(600):
            if b"1 threads" in log.read_bytes():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        with lock.open("rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    with lock.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_server_that_has_ended_is_an_error():
    starter = Starter()
    try:
        starter._server()
        starter._process.kill()
        starter._process.wait()
        with pytest.raises((RemoeError, OSError)):
            starter.start(["--version"], os.environ, stdout=1, stderr=2)
    finally:
        starter.close()
