"""An interactive session: a question or the beginning of a text, what the model writes, and so on."""

import contextlib
import io
import signal
import sys
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remoe.errors import ConfigError, RemoeError
from remoe.lab.console import emit
from remoe.lab.data.documents import ANSWERS
from remoe.lab.generation.chat import SYSTEM, USER, ChatTemplate, Message
from remoe.lab.generation.options import SamplingOptions
from remoe.lab.generation.text import Request, check_dial, longest_sequence, prompt_ids, write_texts
from remoe.lab.text import visible
from remoe.lab.training.interrupt import Interrupt, exit_code

HELP = """/set              show the sampling options
/set NAME VALUE   change one of them, as in /set max_experts 2; "none" takes a limit back
/reset            forget the conversation
/help             show this
/quit             end, as Ctrl-D does
Ctrl-C            stop what is being written"""


class Session:
    """A session on standard input and standard output; what the model did not write goes to standard error.

    Args:
        model: any that `write_texts` takes.
        tokenizer: the model's own.
        sampling: the options at the beginning.
        template: for a conversation; None to continue each line as a text of its own.
        system: message at the beginning of a conversation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingOptions,
        template: ChatTemplate | None = None,
        system: str | None = None,
    ) -> None:
        check_dial(model, sampling)
        self.model, self.tokenizer, self.sampling, self.template = model, tokenizer, sampling, template
        self.start: list[Message] = [] if system is None else [{"role": SYSTEM, "content": system}]
        self.turns: list[Message] = []

    def run(self) -> None:
        """Answers until the input ends."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import_module("readline")  # keys that edit a line, and earlier lines
            _say("/help lists the commands; Ctrl-D ends")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # such a line is refused, and the session goes on
        while (line := _read(terminal)) is not None:
            try:
                if line.startswith("/"):
                    if not self._command(line.split()):
                        return
                elif line.strip():
                    self._answer(line)
            except RemoeError as error:
                _say(visible(str(error)))

    def _command(self, words: list[str]) -> bool:
        """False where it ends the session."""
        match words:
            case ["/quit"]:
                return False
            case ["/help"]:
                _say(HELP)
            case ["/reset"]:
                self.turns = []
            case ["/set"]:
                _say("\n".join(f"{field.name} {getattr(self.sampling, field.name)}" for field in fields(self.sampling)))
            case ["/set", name, value]:
                self._set(name.lstrip("-").replace("-", "_"), value)
            case _:
                _say(f"unknown command {visible(' '.join(words))}; /help lists the commands")
        return True

    def _set(self, name: str, word: str) -> None:
        kinds: dict[str, Any] = {field.name: field.type for field in fields(self.sampling)}
        if name not in kinds:
            raise ConfigError(f"unknown option {name!r}; choose one of: {', '.join(kinds)}")
        value = None
        if word.lower() != "none" or kinds[name] in (int, float):
            kind = int if kinds[name] in (int, int | None) else float
            try:
                value = kind(word)
            except ValueError:
                raise ConfigError(f"{name} must be a {'whole ' * (kind is int)}number, but is {word!r}") from None
        changed = replace(self.sampling, **{name: value})
        changed.check()
        check_dial(self.model, changed)
        self.sampling = changed

    def _answer(self, text: str) -> None:
        question = {"role": USER, "content": text}
        request, shown = self._request(question)
        pieces: list[str] = []

        def write(number: int, piece: str, last: bool) -> None:
            emit(piece if pieces else shown + piece)
            pieces.append(piece)

        stop = Interrupt()
        try:
            with stop:
                options = {"write": write, "stopped": lambda: stop.received is not None}
                list(write_texts(self.model, self.tokenizer, [request], self.sampling, **options))
        except KeyboardInterrupt:  # the second
            stop.received = signal.SIGINT
        emit("\n")
        if stop.received not in (None, signal.SIGINT):
            raise SystemExit(exit_code(stop.received))
        if stop.received:
            _say("(stopped)")
        if self.template is not None:
            self.turns += [question, {"role": ANSWERS, "content": "".join(pieces).strip()}]

    def _request(self, question: Message) -> tuple[Request, str]:
        """What the model is to continue, and what of it is shown as part of the text."""
        if self.template is None:
            return Request(prompt_ids(self.model, self.tokenizer, question["content"])), question["content"]
        messages = [*self.start, *self.turns, question]
        if (window := longest_sequence(self.model)) is not None:
            messages, left_out = self.template.fit(messages, window - self.sampling.max_new_tokens)
            self.turns = messages[len(self.start) : -1]
            if left_out:
                turns = "turn is" if left_out == 1 else f"{left_out} turns are"
                _say(f"(the oldest {turns} left out: with the answer, the window has room for {window} tokens)")
        return Request(self.template.encode(messages), self.template.ending), ""


def _read(terminal: bool) -> str | None:
    """A line; None at the end of the input."""
    while True:
        try:
            if terminal and not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            return input("> " if terminal and sys.stdout.isatty() else "")
        except EOFError:
            if terminal:
                _say("")
            return None
        except KeyboardInterrupt:
            if not terminal:
                raise
            _say("\nCtrl-D or /quit ends the session")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
