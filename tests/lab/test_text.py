"""Text of a user's data reaches a terminal and Markdown as text alone."""

import io
import logging
import os
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from markdown_it import MarkdownIt
from rich.table import Table

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.cli.main import COMMANDS, main
from remoe.lab.console import Console
from remoe.lab.export.card import _domains
from remoe.lab.report.sections import page_data
from remoe.lab.text import RED, for_terminal, lines, markdown, short_name, visible

STRANGE = [
    "| a |", "# Heading", "a\nb", "- item", "1. one", "> quote", "`code", "<b>bold</b>", "&amp;", "[a](http://b.c)",
    "![a](b)", "http://a.bc", "www.a.bc", "me@a.bc", "*em* _em_ **b**", "~~gone~~", "$x$", "a\\|b", "\\", "***", "---",
    "<!-- x", "<script>alert(1)</script>", "a | b | c", "[^1]", "# ", "===", "+ x", "    indented", "\ttab",
    "snake_case_name", "_private_", "C++", "c# .net", "100%", "a  b",
]  # fmt: skip
FRAMES = {"heading": "# {}", "line": "words {}", "cell": "| a | b |\n|---|---|\n| {} | 1 |"}
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def made_up(seed: int) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice("ab1 \t\n|#*_`<>&[]()!~$\\:/@.-+=^{}w") for _ in range(generator.randrange(1, 14)))


@pytest.mark.parametrize("text", [*STRANGE, *map(made_up, range(60))])
@pytest.mark.parametrize("frame", FRAMES)
def test_markdown_shows_a_name_as_it_is(frame, text):
    page, usual = (PARSER.parse(FRAMES[frame].format(name)) for name in (markdown(text), "name"))
    assert [token.type for token in page] == [token.type for token in usual]
    shown, expected = [[t.children for t in tokens if t.type == "inline"] for tokens in (page, usual)]
    for ours, theirs in zip(shown, expected, strict=True):
        assert {child.type for child in ours} <= {"text"}
        words = "".join(child.content for child in theirs)
        assert (
            "".join(child.content for child in ours) == words.replace("name", " ".join(visible(text).split())).strip()
        )


def test_the_card_has_a_row_of_five_cells_for_every_domain():
    names = ["| a |", "# Heading", "a\nb", "<b>", "all"]
    row = {"loss": 1.0, "perplexity": 2.0, "bits_per_byte": 3.0, "sparsity": 0.5}
    rows = [
        token for token in PARSER.parse(_domains({"validation": dict.fromkeys(names, row)}, True)) if token.children
    ]
    shown = ["".join(child.content for child in token.children) for token in rows]
    assert shown[5::5] == ["| a |", "# Heading", r"a\nb", "<b>", "all"]
    assert len(shown) == 5 * (1 + len(names))


def test_the_page_shows_controls_as_their_escapes_and_the_lines_of_a_text():
    zero, ones = torch.zeros(61, dtype=torch.int64), torch.ones(1, 61, 2)
    texts, token_T = ["a\n", *["\u202e"] * 60], torch.tensor([0] + [1] * 60)
    domains = ["\x1b" + "x" * 3000]
    record = RoutingRecord.of(ones.bool(), token_T, zero, zero, domains, gate_LTE=ones, texts=texts)
    content = page_data(None, None, record, excerpt_tokens=2)
    assert content["experts"]["domains"] == [r"\x1b" + "x" * 22 + "…" + "x" * 13]
    assert content["experts"]["top"] == [[[r"\u202e"]] * 2]
    assert content["experts"]["contexts"][0][0][0] == ["", "a\n", r"\u202e" * 8, 1.0]
    (text,) = content["text"]["texts"]
    assert (text["domain"], text["tokens"]) == (content["experts"]["domains"][0], ["a\n", r"\u202e"])


def test_what_steers_a_terminal_is_written_out():
    assert visible("\x1b[31mred\x07 \x9b\u202e\u2028\udcff") == r"\x1b[31mred\x07 \x9b\u202e\u2028\udcff"
    assert visible("a\nb") == r"a\nb"
    assert lines("a\nb\tc\rd") == "a\nb\tc\\rd"
    for text in ("é 中文 📚", "می\u200cخواهم", "👩\u200d🌾"):
        assert visible(text) == text
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert visible(visible(everything)) == visible(everything)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", visible(everything))


def test_a_long_name_keeps_its_ends():
    assert short_name("x" * 40) == "x" * 40
    assert short_name("a" * 3000 + "z") == "a" * 26 + "…" + "a" * 12 + "z"


def test_the_console_writes_control_characters_out(capsys):
    table = Table("a\x1b[1m", title="t\x1b[2m")
    table.add_row("c\x1b[3m")
    Console(width=80).print("s\x1b[4m\nnext", table)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for number, letter in enumerate("atcs", 1):
        assert rf"{letter}\x1b[{number}m" in out
    assert "\nnext" in out


def test_messages_of_errors_are_one_visible_line(capsys):
    assert main(["data", "prepare", "no\x1b[31m\nsuch\udcff", "--out", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert r"no\x1b[31m\nsuch\udcff: this name is not UTF-8; rename it" in error


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_message_on_a_terminal_is_broken_between_words_and_coloured(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((30, 24)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    message = "remoe: error: --steps must be at least 1, but is -1234567, see a/rather/long/path/of/some/file.yaml"
    shown = for_terminal(message, Terminal(), RED)
    assert shown.startswith("\x1b[31mremoe: error:")
    assert shown.endswith("\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    lines = for_terminal(message, Terminal(), RED).split("\n")
    assert " ".join(lines) == message
    assert all(len(line) <= 30 or " " not in line for line in lines)
    assert for_terminal(message, io.StringIO(), RED) == message
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in for_terminal(message, Terminal(), RED)


def test_a_warning_reaches_standard_error_once(capsys, monkeypatch):
    def warn(argv):
        logging.getLogger("remoe.lab").warning("all is %s lost", "\x1b[1m")
        return 0

    monkeypatch.setitem(sys.modules, "warning_command", SimpleNamespace(warn=warn))
    monkeypatch.setitem(COMMANDS, "warn", ("warning_command", "warn", ""))
    assert main(["warn"]) == 0
    assert capsys.readouterr().err == ""  # the handlers of the tests have it
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main(["warn"]) == 0
    assert capsys.readouterr().err == "all is \\x1b[1m lost\n"
    assert not logging.getLogger("remoe").handlers


def test_no_number_is_broken_in_a_narrow_terminal():
    file = io.StringIO()
    console = Console(width=40, file=file, force_terminal=True, color_system=None)
    console.print("the largest is 1,234,567 and another one is 9,876,543.21, which is larger")
    table = Table("domain")
    table.add_column("tokens", no_wrap=True)
    table.add_row("a name that needs more than one line of this table", "1,234,567.89")
    console.print(table)
    shown = file.getvalue()
    assert all(len(line) <= 40 for line in shown.splitlines())
    assert all(number in shown for number in ("1,234,567", "9,876,543.21", "1,234,567.89"))
    file = io.StringIO()
    Console(width=40, file=file).print("word " * 30)
    assert file.getvalue().count("\n") == 1
