"""`remoe` in processes of its own, forked from one that has imported everything already: they start at once.

`Popen` stands in for `subprocess.Popen`. The first call starts a server, which ends with this process; what it forks
may use it too. A `remoe compare` that runs in such a process starts its runs in the same way; so does one in this
process after `use_in_compare`.
"""

import atexit
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from types import SimpleNamespace

MODULES = ("remoe.lab.training.train", "remoe.lab.cli.train", "remoe.lab.cli.compare", "torch.utils.tensorboard")
COMMAND = [sys.executable, "-m", "remoe.lab.cli.main"]
ADDRESS = "REMOE_TESTS_SERVER"


def context() -> multiprocessing.context.BaseContext:
    """For functions instead of commands; where the system cannot fork, its processes start slowly."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(MODULES))
    return found


def use_in_compare(replace=setattr) -> None:
    """`remoe compare` in this process starts its runs by `Popen`; `replace` may be that of a monkeypatch."""
    module = import_module("remoe.lab.compare.runner")
    replace(module, "subprocess", SimpleNamespace(Popen=Popen, DEVNULL=subprocess.DEVNULL))


class Popen:
    """As `subprocess.Popen`, for a command that begins with COMMAND. Files and descriptors are passed on.

    Args:
        largest_file: in bytes; the system lets no file of the process grow beyond it. No limit by default.
        others: those of `subprocess.Popen`.
    """

    def __init__(
        self, command, *, stdin=None, stdout=None, stderr=None, env=None, start_new_session=False, pass_fds=(),
        largest_file=None,
    ) -> None:  # fmt: skip
        assert command[: len(COMMAND)] == COMMAND
        self.returncode = self.stdout = None
        with open(os.devnull) as nothing:
            if stdout == subprocess.PIPE:
                reader, stdout = os.pipe()
                self.stdout = os.fdopen(reader, "rb", buffering=0)
            numbers = [_number(nothing if stdin is None else stdin, nothing), _number(stdout, nothing)]
            numbers.append(numbers[1] if stderr == subprocess.STDOUT else _number(stderr, nothing))
            request = {
                "argv": command[len(COMMAND) :],
                "folder": os.getcwd(),
                "environment": dict(os.environ if env is None else env),
                "new_session": start_new_session,
                "largest_file": largest_file,
            }
            request["environment"][ADDRESS] = _address()
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(_address())
            # The descriptors first, with one byte: so much surely arrives in one piece.
            socket.send_fds(self._socket, [b"!"], [*numbers, *pass_fds])
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        if self.stdout is not None:
            os.close(stdout)
        self._answers = self._socket.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self):
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("remoe", timeout)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._socket.close()
        return self.returncode

    def communicate(self, timeout):
        """All of its output, standard error included."""
        deadline, output = time.monotonic() + timeout, b""
        while select.select([self.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (part := self.stdout.read(1 << 16)):
                self.wait(timeout)
                return output.decode(), None
            output += part
        raise subprocess.TimeoutExpired("remoe", timeout, output)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def _number(file, nothing) -> int:
    if file in (None, subprocess.DEVNULL):
        return nothing.fileno() if file else 2
    return file if isinstance(file, int) else file.fileno()


def _address() -> str:
    """Of the server, which is started unless there is one."""
    if ADDRESS not in os.environ:
        folder = tempfile.mkdtemp(prefix="remoe-")  # a socket's path must be short
        path = os.path.join(folder, "server")
        server = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE)
        while not os.path.exists(path):
            assert server.poll() is None
            time.sleep(0.05)
        atexit.register(_stop, server, folder)
        os.environ[ADDRESS] = path
    return os.environ[ADDRESS]


def _stop(server, folder) -> None:
    server.kill()
    server.wait()
    os.unlink(os.path.join(folder, "server"))
    os.rmdir(folder)


def _serve(path: str) -> None:
    """Forks a process for each request; one between the two waits for its end."""
    for module in MODULES:
        import_module(module)
    use_in_compare()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(16)
    os.rename(path + ".new", path)
    while True:
        if listener in select.select([listener, 0], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _fork(connection)
            connection.close()
        else:  # standard input is closed: the tests are over
            return None


def _fork(connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 16)
    request = json.loads(connection.makefile("r").readline())
    if pid := os.fork():
        for number in descriptors:
            os.close(number)
        try:
            connection.sendall(b"%d\n" % pid)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(b"%d\n" % status)
        except BrokenPipeError:  # who asked for the process has been killed
            pass
        os._exit(0)
    connection.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    for number in range(3):
        os.dup2(descriptors[number], number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["largest_file"]:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main = import_module("remoe.lab.cli.main").main
    sys.exit(main(request["argv"]))


if __name__ == "__main__":
    _serve(sys.argv[1])
