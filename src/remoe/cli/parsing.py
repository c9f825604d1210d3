"""One way to parse options for every command: tyro, with each mistake reported in one line."""

import contextlib
import io
import sys
from typing import TypeVar

import tyro

from remoe.errors import ConfigError

T = TypeVar("T")


def parse(cls: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """Parses flags into a dataclass.

    Args:
        cls: dataclass whose fields are the flags, with their docstrings as help.
        argv: arguments after the command's name.
        prog: what `--help` calls the command.
        default: values of flags that are not given; `cls()` by default.

    Raises:
        ConfigError: for unknown flags and bad values.
        SystemExit: with code 0 after `--help`.
    """
    complaint = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, prog=prog, args=argv, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_first_sentence(complaint.getvalue())} (see {prog} --help)") from None


def _first_sentence(box: str) -> str:
    """tyro draws a box: the lines between its title and its first rule are the message."""
    lines = [line.strip(" │╭╰╮╯─-|+") for line in box.splitlines()[1:]]
    message = []
    for line in lines:
        if not line:
            break
        message.append(line)
    return " ".join(message) or " ".join(box.split())


def fail(message: str) -> int:
    """Prints one line of error; returns exit code 2."""
    print(f"remoe: error: {message}", file=sys.stderr)
    return 2
