"""Text that a user's data brings, such as the name of a domain, escaped for where it goes.

HTML needs nothing more than Jinja's own escapes; file names consist of names that `remoe.lab.compare` checks.
"""

import os
import re
import shutil
import textwrap
import unicodedata
from typing import TextIO

RED, YELLOW = 31, 33  # of ANSI

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as overrides of direction, half characters, new lines
_HARMLESS = "\u061c\u200c\u200d\u200e\u200f"  # marks and joiners, with which words of several scripts are spelled
_MARKDOWN = re.compile(r"[\\`*{}\[\]<>#|~!$&@^]|:(?=//)|(?<!\w)_|_(?!\w)|(?<=www)\.")


def visible(text: str, keep: str = "") -> str:
    r"""Characters that steer a terminal or hide as Python's escapes, such as \x1b, other than those in `keep`."""
    if text.isprintable():  # false for these and some more
        return text
    unseen = (unicodedata.category(character) in _UNSEEN and character not in _HARMLESS + keep for character in text)
    pairs = zip(text, unseen, strict=True)
    return "".join(character.encode("unicode_escape").decode() if hide else character for character, hide in pairs)


def lines(text: str) -> str:
    """`visible` for text of several lines, which stay."""
    return visible(text, keep="\n\t")


def for_terminal(text: str, stream: TextIO, colour: int) -> str:
    """A line as it is written to `stream`: on a terminal broken between words, and coloured where colours are shown."""
    if not stream.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns)
    shown = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return shown
    return f"\033[{colour}m{shown}\033[0m"


def short_name(text: str, longest: int = 40) -> str:
    """A name for one line: `visible`, and without its middle if it has more than `longest` characters."""
    shown = visible(text)
    if len(shown) <= longest:
        return shown
    end = longest // 3
    return f"{shown[: longest - 1 - end]}…{shown[-end:]}"


def markdown(text: str, longest: int = 200) -> str:
    """A name that Markdown shows as it is, in a line of text, a heading or a table's cell."""
    return _MARKDOWN.sub(lambda found: "\\" + found[0], " ".join(short_name(text, longest).split()))
