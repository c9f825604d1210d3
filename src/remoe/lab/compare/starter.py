"""Starts `remoe` commands in processes of their own, forked from one that has imported PyTorch and the rest already.

A new Python needs seconds for these imports, as long as a short run trains. Where the system is not Linux, each command
gets a new Python: elsewhere, libraries that PyTorch uses do not survive a fork.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from threading import Lock
from typing import Protocol, Self

from remoe.errors import RemoeError
from remoe.lab.cli.main import before_imports, main

MODULES = ("remoe.lab.cli.train", "remoe.lab.training.train", "torch.utils.tensorboard")


class Started(Protocol):
    """A process; the part of `subprocess.Popen` that is needed of it."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int) -> None: ...


class Starter:
    """Starts commands; a context manager. Their processes go on when it is closed or when its own process is killed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    def start(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int,
        stderr: int,
        keep_open: Sequence[int] = (),
    ) -> Started:
        """Starts `remoe ARGV` in a session of its own, so that a terminal's Ctrl-C does not reach it.

        Args:
            argv: arguments.
            environment: all of its environment variables; OMP_NUM_THREADS is its number of threads.
            stdout, stderr: file descriptors.
            keep_open: further ones that it holds.
        """
        if sys.platform != "linux":
            command = [sys.executable, "-m", "remoe.lab.cli.main", *argv]
            options = {"start_new_session": True, "pass_fds": keep_open} if os.name == "posix" else {}
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, **options
            )
        request = {"argv": list(argv), "folder": os.getcwd(), "environment": dict(environment)}
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            socket.send_fds(self._server(), [b"!"], [theirs.fileno(), stdout, stderr, *keep_open])
        ours.sendall(json.dumps(request).encode() + b"\n")
        return _Forked(ours)

    def _server(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair()
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            with theirs:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
                )
        return self._channel

    def close(self) -> None:
        """Ends the process that starts the others."""
        if self._channel is not None and self._process is not None:
            self._channel.close()
            self._process.terminate()  # it may be importing still
            self._process.wait()
            self._channel = self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Forked:
    """A process that the server has forked; two lines come from it: its number, and how it ended."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile()
        self.pid = self._number()
        self.returncode: int | None = None

    def _number(self) -> int:
        if not (line := self._lines.readline()):
            raise RemoeError("the process that starts the runs has ended")
        return int(line)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("remoe", timeout or 0)
            self.returncode = self._number()
            self._lines.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _serve(channel: socket.socket) -> None:
    """Forks for each request, until the channel is closed."""
    before_imports()
    for name in MODULES:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes between this one and the commands
    while True:
        byte, descriptors, _, _ = socket.recv_fds(channel, 1, 64)
        if not byte:
            return
        if os.fork() == 0:
            channel.close()
            _run(*descriptors)
        for number in descriptors:
            os.close(number)


def _run(connection_fd: int, stdout: int, stderr: int, *keep_open: int) -> None:
    """Runs one command in a further fork, and reports its number and its end. Does not return."""
    connection = socket.socket(fileno=connection_fd)
    request = json.loads(connection.makefile().readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        for number in (stdout, stderr, *keep_open):
            os.close(number)
        try:
            connection.sendall(b"%d\n" % pid)
            status = os.waitpid(pid, 0)[1]
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        except BrokenPipeError:  # who asked for it has been killed
            pass
        os._exit(0)
    connection.close()
    os.setsid()
    for number, given in ((1, stdout), (2, stderr)):
        os.dup2(given, number)
        os.close(given)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if threads := os.environ.get("OMP_NUM_THREADS"):  # read when PyTorch was imported, with another value
        import_module("torch").set_num_threads(int(threads))
    sys.exit(main(request["argv"]))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
