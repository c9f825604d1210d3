"""`remoe generate`: prompts from everywhere, texts as they are written, and sessions."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading

import pytest
import small_writer

from remoe.errors import DataError
from remoe.lab.cli import generate
from remoe.lab.cli.main import main
from remoe.lab.generation import SamplingOptions, generate_text, write_texts
from remoe.lab.generation.chat import ChatTemplate
from remoe.lab.generation.prompts import read_prompts
from remoe.lab.generation.session import Session
from remoe.lab.generation.text import Request
from remoe.lab.text import lines
from remoe.lab.training.load import load_model

GREEDY = ["--temperature", "0", "--max-new-tokens", "6", "--device", "cpu"]
SAMPLING = SamplingOptions(max_new_tokens=6, temperature=0)
PROMPTS = ["cow 1. sheep", "hen goat barn road", "bus"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_writer.save(tmp_path_factory.mktemp("writer"), small_writer.CHAT))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)[:2]


@pytest.fixture(scope="module")
def texts(loaded):
    return [generate_text(*loaded, prompt, SAMPLING) for prompt in PROMPTS]


@pytest.fixture
def answers(loaded):
    """The answer to a conversation: pairs of role and content."""
    template = ChatTemplate(loaded[1])

    def answer(*messages):
        ids = template.encode([{"role": role, "content": content} for role, content in messages])
        (written,) = write_texts(*loaded, [Request(ids, template.ending)], SAMPLING)
        return written.text

    return answer


def test_texts_are_printed_in_order_as_they_are_written(folder, texts, capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr(generate, "emit", lambda text: pieces.append(text) or print(text, end=""))
    for batch_size in ("1", "3"):
        pieces.clear()
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        assert main(["generate", folder, *prompts, *GREEDY, "--batch-size", batch_size]) == 0
        whole = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
        assert capsys.readouterr().out == "\n\n".join(whole) + "\n"
        assert PROMPTS[0] < pieces[0] < whole[0]
        assert len(pieces) > 2 * len(PROMPTS)


def test_prompts_come_from_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffcow\r\n\n sheep \x0b\nend".encode())
    assert [prompt.text for prompt in read_prompts(str(path))] == ["cow", " sheep \x0b", "end"]
    assert [prompt.text for prompt in read_prompts(str(path), "whole")] == ["cow\r\n\n sheep \x0b\nend"]
    rows = [{"prompt": "cow", "id": 7}, {"messages": [{"role": "user", "content": "cow?"}]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    text, chat = read_prompts(str(path))
    assert (text.text, text.row) == ("cow", rows[0])
    assert (chat.text, chat.messages) == ("", tuple(rows[1]["messages"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n \n", "no prompt"),
        (b"cow\xff", r"not UTF-8 text \(byte 3"),
        (b"{", "line 1: not valid JSON"),
        (b"[1]", "line 1: must be a JSON object with either"),
        (b'{"prompt": "a", "messages": []}', "either `prompt` or `messages`"),
        (b'{"prompt": 3}', "`prompt` is not text"),
        (b'{"messages": [{"role": "user"}]}', "a message must have `role` and `content`"),
        (b'{"messages": [{"role": "assistant", "content": "cow"}]}', "the last message is an answer already"),
    ],
)
def test_a_faulty_file_is_named(content, words, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_prompts(str(path))


def test_standard_input_is_read_where_it_is_a_pipe(folder, texts, capsys, monkeypatch):
    for flags in ([], ["--file", "-"]):
        out, into = os.pipe()
        os.write(into, "\n".join(PROMPTS).encode())
        os.close(into)
        with open(out) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert main(["generate", folder, *flags, *GREEDY]) == 0
        expected = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
        assert capsys.readouterr().out == "\n\n".join(expected) + "\n"


def test_a_file_of_texts_keeps_what_came_with_the_prompts_and_is_never_overwritten(folder, texts, tmp_path, capsys):
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    command = ["generate", folder, "--file", str(path), *GREEDY]
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr() == ("", f"3 of 3 texts are in {out}\n")
    written = out.read_bytes()
    expected = [row | {"text": text, "tokens": 6, "ended": False} for row, text in zip(rows, texts, strict=True)]
    assert [json.loads(line) for line in written.decode().splitlines()] == expected
    for place in (out, path, tmp_path):
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        assert main([*command, "--out", str(place)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_interrupted_file_has_the_texts_that_are_done(folder, texts, tmp_path, monkeypatch):
    from remoe.lab.generation import text

    def interrupted(*arguments, **options):
        yield next(write_texts(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "write_texts", interrupted)
    out = tmp_path / "texts.jsonl"
    assert main(["generate", folder, "--prompt", PROMPTS[0], "--prompt", "bus", *GREEDY, "--out", str(out)]) == 130
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == texts[:1]


def test_questions_are_put_by_the_template(folder, answers, tmp_path, capsys):
    command = ["generate", folder, *GREEDY]
    assert main([*command, "--chat", "--prompt", "cow?"]) == 0
    assert capsys.readouterr().out == answers(("user", "cow?")) + "\n"
    path = tmp_path / "chats.jsonl"
    chats = [[("user", "cow?")], [("system", "town"), ("user", "bus?")]]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main([*command, "--file", str(path), "--chat", "--system", "farm"]) == 0
    expected = [answers(("system", "farm"), *chats[0]), answers(*chats[1])]
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"
    path.write_text(json.dumps(rows[0] | {"messages": [{"role": "user", "content": "\ud800"}]}))
    assert main([*command, "--file", str(path)]) == 2
    assert "line 1: the prompt is not valid UTF-8 text" in capsys.readouterr().err


def test_chat_needs_a_template(folder, tmp_path, capsys):
    small_writer.save(tmp_path / "plain")
    assert main(["generate", str(tmp_path / "plain"), "--chat", "--prompt", "cow", *GREEDY]) == 2
    error = "remoe: error: --chat needs a tokenizer with a chat template, and this model's has none\n"
    assert capsys.readouterr().err == error


def session(loaded, monkeypatch, capsys, typed, chat=True, system=None):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    Session(*loaded, SAMPLING, ChatTemplate(loaded[1]) if chat else None, system).run()
    return capsys.readouterr()


def test_a_conversation_goes_on_until_it_is_forgotten(loaded, answers, monkeypatch, capsys):
    first = answers(("system", "farm"), ("user", "cow?"))
    second = answers(("system", "farm"), ("user", "cow?"), ("assistant", first.strip()), ("user", "bus?"))
    assert second != answers(("system", "farm"), ("user", "bus?"))
    typed = ["cow?", "", "bus?", "/reset", "cow?", "/quit", "bus?"]
    said = session(loaded, monkeypatch, capsys, typed, system="farm")
    assert said == (f"{first}\n{second}\n{first}\n", "")


def test_lines_without_a_template_are_texts_of_their_own(loaded, texts, monkeypatch, capsys):
    said = session(loaded, monkeypatch, capsys, [PROMPTS[0], PROMPTS[2]], chat=False)
    assert said.out == f"{PROMPTS[0]}{texts[0]}\n{PROMPTS[2]}{texts[2]}\n"


def test_the_dial_and_the_sampling_can_be_set(loaded, texts, monkeypatch, capsys):
    capped = generate_text(*loaded, PROMPTS[0], SamplingOptions(max_new_tokens=6, temperature=0, max_experts=1))
    closed = generate_text(*loaded, PROMPTS[0], SamplingOptions(max_new_tokens=6, temperature=0, gate_threshold=1e6))
    assert len({capped, closed, texts[0]}) == 3
    typed = ["/set max_experts 1", PROMPTS[0], "/set --max-experts none", PROMPTS[0], "/set gate_threshold 1e6"]
    typed += [PROMPTS[0], "/set max_experts 0", "/set seed none", "/set colour 1", "/set top_k 1.5", "/what", "/set"]
    said = session(loaded, monkeypatch, capsys, typed, chat=False)
    assert said.out == "".join(f"{PROMPTS[0]}{text}\n" for text in (capped, texts[0], closed))
    errors = said.err.splitlines()
    assert errors[:2] == ["--max-experts must be at least 1, but is 0", "seed must be a whole number, but is 'none'"]
    assert errors[2].startswith("unknown option 'colour'; choose one of: ")
    assert errors[3:5] == [
        "top_k must be a whole number, but is '1.5'",
        "unknown command /what; /help lists the commands",
    ]
    assert {"gate_threshold 1000000.0", "max_experts None"} <= set(errors[5:])


def test_the_oldest_turns_leave_a_full_window_and_that_is_said(loaded, monkeypatch, capsys):
    monkeypatch.setattr(loaded[0].config, "max_position_embeddings", 48)
    said = session(loaded, monkeypatch, capsys, ["cow 1. sheep?"] * 3)
    message = "(the oldest turn is left out: with the answer, the window has room for 48 tokens)"
    assert message in said.err.splitlines()


def test_an_error_does_not_end_a_session(loaded, texts, monkeypatch, capsys):
    said = session(loaded, monkeypatch, capsys, ["cow " * 40_000, "\udcff", PROMPTS[0]], chat=False)
    assert said.out == f"{PROMPTS[0]}{texts[0]}\n"
    long, broken = said.err.splitlines()
    assert long == "the prompt has 40,001 tokens; this model takes at most 16,384"
    assert broken.startswith("the prompt is not valid UTF-8 text")


class Terminal:
    """A pseudo-terminal, and somebody at it who types the next line when the last word of the screen is a prompt."""

    def __init__(self, lines):
        self.ours, self.theirs = pty.openpty()
        self.screen, self.lines = "", list(lines)
        self.user = threading.Thread(target=self._use, daemon=True)
        self.user.start()

    def _use(self):
        seen, key = 0, ""
        while True:
            # Python loses an interrupt between its prompt and its read; whoever sees nothing happen presses again.
            if key == "\x03" and not select.select([self.ours], [], [], 3)[0]:
                os.write(self.ours, key.encode())
            try:
                new = os.read(self.ours, 1 << 16)
            except OSError:  # closed at the other end
                return
            self.screen += new.decode(errors="replace")
            if self.screen.endswith("> ") and len(self.screen) > seen and self.lines:
                seen, key = len(self.screen), self.lines.pop(0)
                os.write(self.ours, key.encode())


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_terminal_without_a_prompt_begins_a_session(folder, texts, monkeypatch):
    terminal = Terminal([f"{PROMPTS[0]}\n", "\x1b[31m\n", "\x04"])
    interrupts = []

    def emit(text, emit=generate.emit):
        emit(text)
        if len(interrupts) < 1 and "cow" not in text:  # a piece after the first
            interrupts.append(text)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("remoe.lab.generation.session.emit", emit)
    with open(terminal.theirs) as stdin, open(os.dup(terminal.theirs), "w") as stdout:
        for name, stream in {"stdin": stdin, "stdout": stdout, "stderr": stdout}.items():
            monkeypatch.setattr(sys, name, stream)
        assert main(["generate", folder, *GREEDY]) == 0
        stdout.flush()
    terminal.user.join(10)
    screen = terminal.screen.replace("\r\n", "\n")
    typed, _, rest = screen.partition(f"> {PROMPTS[0]}\n")
    shown, _, rest = rest.partition("\n(stopped)\n> ")
    expected = PROMPTS[0] + lines(texts[0])
    assert typed.endswith("Ctrl-D ends\n")
    assert expected.startswith(shown)
    assert len(PROMPTS[0]) < len(shown) < len(expected)
    assert "\n\\x1b[31m" in rest
    assert "\x1b[31m" not in rest


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_keys_of_a_terminal_in_a_process_of_its_own(folder):
    terminal = Terminal(["cow?\n", "\x03", "/quit\n"])
    command = [sys.executable, "-m", "remoe", "generate", folder, "--chat", "--max-new-tokens", "4", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
         "os.execv(sys.argv[1], sys.argv[1:])", *command],
        stdin=terminal.theirs, stdout=terminal.theirs, stderr=terminal.theirs, start_new_session=True,
    )  # fmt: skip
    os.close(terminal.theirs)
    assert process.wait(300) == 0, terminal.screen
    terminal.user.join(10)
    assert "\r\nCtrl-D or /quit ends the session\r\n> /quit" in terminal.screen
