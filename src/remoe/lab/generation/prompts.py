"""Prompts from files and from standard input."""

import json
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from remoe.errors import DataError
from remoe.lab.data.documents import ANSWERS, check_messages

Format = Literal["auto", "lines", "jsonl", "whole"]
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer.

    Attributes:
        text: the prompt; empty with `messages`.
        messages: the conversation, each with `role` and `content`; empty with `text`.
        place: where it is from, for errors; empty for an option.
        row: the object that it is from, with all its keys.
    """

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    place: str = ""
    row: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, place: str = "") -> "Prompt":
        """A prompt that is a text alone."""
        return cls(text, place=place, row={"prompt": text})


def is_piped() -> bool:
    """Whether standard input is a pipe, a socket or a file, so that it may hold prompts: no terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or something of a program's own
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_prompts(path: str, form: Format = "auto") -> list[Prompt]:
    """The prompts of a file, or of standard input for "-".

    Args:
        path: the file.
        form: "lines" for one prompt in each line that is not blank; "jsonl" for one JSON object in each line, with
            `prompt`, a text, or `messages`, a conversation; "whole" for one prompt. "auto" is "jsonl" for a name that
            ends with .jsonl, otherwise "lines".

    Raises:
        DataError: for a file that cannot be read, is not UTF-8, or has no prompt, and for a row that is not one.
    """
    name = "standard input" if path == STANDARD_INPUT else path
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (byte {error.start} cannot be decoded)") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    if form == "auto":
        form = "jsonl" if path.lower().endswith(".jsonl") else "lines"
    if form == "whole":
        return [Prompt.of(text, name)]
    lines = enumerate(text.split("\n"), start=1)
    lines = [(line.removesuffix("\r"), f"{name}: line {number}") for number, line in lines if line.strip()]
    if not lines:
        hint = "; --prompt '' starts a new document" if path == STANDARD_INPUT else ""
        raise DataError(f"{name}: no prompt{hint}")
    return [_of_json(line, place) if form == "jsonl" else Prompt.of(line, place) for line, place in lines]


def _content(path: str) -> bytes:
    if path == STANDARD_INPUT:
        return sys.stdin.buffer.read()
    # Reading a pipe of the file system waits for somebody who writes; a shell's <(command), a link, has one.
    if stat.S_ISFIFO(os.lstat(path).st_mode):
        raise OSError("it is a pipe")
    return Path(path).read_bytes()


def _of_json(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise DataError(f"{place}: must be a JSON object with either `prompt` or `messages`")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError(f"{place}: `prompt` is not text")
        return Prompt(row["prompt"], place=place, row=row)
    messages = row["messages"]
    check_messages(messages, place)
    if messages[-1]["role"] == ANSWERS:
        raise DataError(f"{place}: the last message is an answer already")
    return Prompt(messages=tuple(messages), place=place, row=row)
