"""`remoe` in processes of its own that start at once, by the server that `remoe compare` uses.

Each test process has one server; it ends with the process.
"""

import functools
import multiprocessing
import os

from remoe.lab.compare.starter import MODULES, Starter


@functools.cache
def starter() -> Starter:
    return Starter()


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
