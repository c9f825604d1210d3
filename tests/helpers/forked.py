"""Commands in processes of their own, forked from one that has imported PyTorch already: they start at once."""

import multiprocessing
import os
import sys
from pathlib import Path

PRELOADED = ["remoe.lab.cli.train", "remoe.lab.training.train", "torch.utils.tensorboard"]


def context() -> multiprocessing.context.BaseContext:
    """Makes processes; where the system cannot fork, slowly."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start(argv: list[str], output: Path, errors: Path, largest_file: int | None = None) -> multiprocessing.Process:
    """Runs `remoe` with these arguments.

    Args:
        argv: arguments.
        output: file for its standard output.
        errors: file for its standard error.
        largest_file: in bytes; the system lets no file grow beyond it. No limit by default.
    """
    process = context().Process(target=_run, args=(argv, output, errors, largest_file))
    process.start()
    return process


def _run(argv: list[str], output: Path, errors: Path, largest_file: int | None) -> None:
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from remoe.lab.cli.main import main

    sys.exit(main(argv))
