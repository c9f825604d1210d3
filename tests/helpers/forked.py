"""`remoe` in processes of its own that start at once, by the server that `remoe compare` uses.

Each test process has one process that has imported everything, of which all others, the server too, are forks; it ends
with the test process.
"""

import functools
import multiprocessing
import os
import socket
import sys

from remoe.lab.cli.main import main
from remoe.lab.compare import starter as starters
from remoe.lab.compare.starter import MODULES, Starter


@functools.cache
def starter() -> Starter:
    return _Ready() if sys.platform == "linux" else Starter()


class Shared(Starter):
    """Takes the place of the `Starter` of a comparison in this process: that of the tests is running already."""

    def start(self, *arguments, **options):
        return starter().start(*arguments, **options)


def context() -> multiprocessing.context.BaseContext:
    """For functions instead of commands; where the system cannot fork, its processes start slowly."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(MODULES))
    return found


def start(argv, output, errors):
    """Runs `remoe ARGV`.

    Args:
        argv: arguments.
        output, errors: paths of the files for its standard output and standard error; they may be the same.
    """
    with output.open("ab") as out, errors.open("ab") as err:
        return starter().start(argv, os.environ, stdout=out.fileno(), stderr=err.fileno())


class _Ready(Starter):
    """Its server is a fork of what `context` has started."""

    def __init__(self):
        super().__init__()
        self._channel, theirs = socket.socketpair()
        context().Process(target=_serve, args=(theirs,), daemon=True).start()
        theirs.close()


def _serve(channel):
    os.setsid()
    starters._serve(channel)


class _Child(Starter):
    """In a process that is forked itself, and so has imported everything: its server is one more fork."""

    def __init__(self):
        super().__init__()
        self._channel, theirs = socket.socketpair()
        if os.fork() == 0:  # now, before there are locks, which it would hold
            self._channel.close()
            _serve(theirs)
            os._exit(0)
        theirs.close()

    def close(self):
        self._channel.close()  # it ends


class Compare:
    """`remoe compare` in a process of its own, with the methods of `subprocess.Popen`; it draws no figures.

    Args:
        argv: arguments.
        output: path of the file for its output and its errors.
    """

    def __init__(self, argv, output):
        self._process = context().Process(target=_compare, args=(argv, output))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout):
        self._process.join(timeout)
        assert self.returncode is not None, "it goes on"
        return self.returncode

    def send_signal(self, number):
        os.kill(self._process.pid, number)


def _compare(argv, output):
    from remoe.lab.compare import output as written
    from remoe.lab.compare import runner

    server = _Child()
    runner.Starter, written.draw = lambda: server, no_figures
    with output.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.exit(main(argv))


def no_figures(experiment, results, records, folder):
    """In the place of `remoe.lab.compare.output.draw`, which takes longer than tiny runs."""
    folder.mkdir(parents=True, exist_ok=True)
    return {}
