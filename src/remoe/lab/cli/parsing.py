"""What every command shares: options parsed by tyro, with each mistake reported in one line, and quiet libraries."""

import contextlib
import io
import itertools
import re
from typing import TypeVar

import tyro

from remoe.errors import ConfigError

T = TypeVar("T")
FRAME = " │╭╰╮╯─-|+"  # the characters of boxes and rules


def parse(cls: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """Parses flags into a dataclass.

    Args:
        cls: dataclass whose fields are the flags; their docstrings are the help texts.
        argv: arguments after the command's name.
        prog: the command's name in `--help`.
        default: values of flags that are not given; `cls()` by default.

    Raises:
        ConfigError: for unknown flags and invalid values.
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
    """tyro prints a title, outside a terminal a rule, the message, a rule, and then perhaps a guess."""
    lines = [line.strip(" │|") if line.strip(FRAME) else "" for line in box.splitlines()[1:]]
    lines = list(itertools.dropwhile(lambda line: not line, lines))
    message = list(itertools.takewhile(bool, lines))
    if message and message[0].startswith("Missing from"):
        # The help of an option is indented further than its name, and may begin a line with another option.
        named = re.findall(r"^[ │|]{4,6}(--[\w.-]+|[A-Z]{2,}(?= *│?$))", box, re.MULTILINE)
        return f"{' and '.join(named)} missing" if named else " ".join(message)
    if novalue := re.match(r"Missing value for argument '(.+?)'", " ".join(message)):
        return f"{novalue[1]} needs a value"
    said = re.sub(r"^Error parsing [A-Z]\w+: ", "", " ".join(message) or " ".join(box.split()))
    if any(line.startswith("Perhaps you meant") for line in lines):
        guess = next((name[0] for line in lines[len(message) :] if (name := re.match(r"--[\w.-]+", line))), None)
        said += f"; perhaps you meant {guess}" if guess else ""
    return said


def quiet_transformers() -> None:
    """Turns off the progress bars that transformers shows for every file that it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
