"""What every command shares: options parsed by tyro, with each mistake reported in one line, and quiet libraries."""

import contextlib
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro

from remoe.costs import ROUTER_SIZES
from remoe.errors import ConfigError, check_choice

T = TypeVar("T")
FRAME = " │╭╰╮╯─-|+"  # the characters of boxes and rules
UNKNOWN = "Unrecognized options: "
NO_VALUE = " needs a value"
NO_NUMBER = r"^Error parsing (\S+): (invalid literal for int\(\) with base 10|could not convert string to float): (.*)"


def parse(cls: type[T], argv: list[str], *, prog: str, default: T | None = None, brief: str | None = None) -> T:
    """Parses flags into a dataclass.

    Args:
        cls: dataclass whose fields are the flags; their docstrings are the help texts.
        argv: arguments after the command's name.
        prog: the command's name in `--help`.
        default: values of flags that are not given; `cls()` by default.
        brief: the text of `--help`, where it does not show all flags; `--help-all` always does.

    Raises:
        ConfigError: for unknown flags and invalid values.
        SystemExit: with code 0 after `--help` and `--help-all`.
    """
    if brief is not None and {"-h", "--help"} & set(argv):
        print(brief)
        raise SystemExit(0)
    argv = ["--help" if word == "--help-all" else word for word in argv]
    complaint = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, prog=prog, args=argv, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        said = _first_sentence(complaint.getvalue())
        if said.startswith(UNKNOWN):
            said = _unknown(said.removeprefix(UNKNOWN).split(", "), _options(cls))
        elif said.endswith(NO_VALUE) and not said.startswith("-"):  # an unknown option before it hides a position
            known = _options(cls)
            given = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
            if strays := [name for name in given if name not in known]:
                said = _unknown(strays, known)
        raise ConfigError(f"{said} (see {prog} --help)") from None


def _options(cls: type) -> list[str]:
    """All flags of a dataclass, as its help names them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"])
    return list(dict.fromkeys(re.findall(r"--[a-z][\w.-]*", text.getvalue())))


def _unknown(arguments: list[str], known: list[str]) -> str:
    """What to say of arguments that are no options; values of unknown flags may be among them."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    if not flags:
        return f"unexpected {arguments[0]!r}"
    name = flags[0].lstrip("-").replace("_", "-")
    near = [option for option in known if option.endswith(f".{name}")]  # of a group
    near = near or difflib.get_close_matches(f"--{name}", known, n=1, cutoff=0.7)
    return f"unknown option{'s'[: len(flags) > 1]} {', '.join(flags)}" + (
        f"; perhaps you meant {' or '.join(near)}" if near else ""
    )


def _first_sentence(box: str) -> str:
    """tyro prints a title, outside a terminal a rule, the message and a rule."""
    lines = [line.strip(" │|") if line.strip(FRAME) else "" for line in box.splitlines()[1:]]
    lines = list(itertools.dropwhile(lambda line: not line, lines))
    message = list(itertools.takewhile(bool, lines))
    if message and message[0].startswith("Missing from"):
        # The help of an option is indented further than its name, and may begin a line with another option.
        named = re.findall(r"^[ │|]{4,6}(--[\w.-]+|[A-Z]{2,}(?= *│?$))", box, re.MULTILINE)
        return f"{' and '.join(named)} missing" if named else " ".join(message)
    if novalue := re.match(r"Missing value for argument '(.+?)'", " ".join(message)):
        return novalue[1] + NO_VALUE
    said = re.sub(r"^Error parsing [A-Z]\w+: ", "", " ".join(message) or " ".join(box.split()))
    return re.sub(NO_NUMBER, _not_a_number, said)


def _not_a_number(said: re.Match) -> str:
    kind = "whole number" if said[2].startswith("invalid") else "number"
    return f"{said[1]} must be a {kind}, but is {said[3]}"


def check_router(name: str) -> None:
    """Raises ConfigError for an unknown router; if a user's own may be loaded, their classes decide later."""
    if not os.environ.get("REMOE_ROUTERS") and "remoe.routing" not in sys.modules:
        check_choice("router", name, ROUTER_SIZES)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Context of work that takes seconds: a terminal shows `text` for as long as it lasts."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Context of imports that take seconds, which a terminal is told; then transformers shows no progress bars."""
    loaded = "transformers" in sys.modules
    with contextlib.nullcontext() if loaded else waiting("loading PyTorch and transformers"):
        yield
        from transformers.utils import logging

        logging.disable_progress_bar()
