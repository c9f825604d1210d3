"""`remoe generate`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.errors import ConfigError, check
from remoe.lab.cli.helps import GENERATE
from remoe.lab.cli.parsing import importing, parse
from remoe.lab.console import emit
from remoe.lab.generation import SamplingOptions
from remoe.lab.generation.prompts import STANDARD_INPUT, Format, Prompt, is_piped, read_prompts
from remoe.lab.outputs import check_output, write_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remoe.lab.generation.chat import ChatTemplate
    from remoe.lab.generation.text import Request, Written

PROG = "remoe generate"


@dataclass
class GenerateOptions:
    """Generate text with a trained model, which is printed as it is written. The same seed gives the same text.

    Without --prompt and --file, prompts come from standard input if it is a pipe or a file, and from a session with
    you on a terminal.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run (its newest checkpoint is used), one of its checkpoints, or the folder of any transformers
    language model with its tokenizer."""
    prompt: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Text to continue; an empty prompt starts a new document. May be given several times."""
    file: str | None = None
    """File of prompts; - for standard input."""
    format: Format = "auto"
    """How prompts are read from --file and standard input. lines: one in each line; jsonl: one JSON object in each
    line, with `prompt` or `messages`; whole: everything is one prompt. auto is jsonl for a file named so, otherwise
    lines."""
    batch_size: int = 8
    """Prompts at a time."""
    out: str | None = None
    """New file to write instead of printing: one JSON object for each prompt, with its text."""
    chat: bool = False
    """Prompts are questions, put to the model by its tokenizer's chat template."""
    system: str | None = None
    """With --chat: the system message before each conversation."""
    interactive: bool = False
    """A session: each line is a prompt; with --chat the conversation goes on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)


def generate_command(argv: list[str]) -> int:
    """Prints each prompt and the model's continuation, or answers; or writes them to a file; or begins a session."""
    options = parse(GenerateOptions, argv, prog=PROG, brief=GENERATE)
    _check(options)
    prompts = None if _is_session(options) else _prompts(options)

    with importing():
        from remoe.lab.generation.chat import ChatTemplate
        from remoe.lab.generation.session import Session
        from remoe.lab.generation.text import write_texts
        from remoe.lab.machine import pick_device
        from remoe.lab.training.load import load_model

    model, tokenizer, _ = load_model(options.run)
    model.to(pick_device(options.device))
    chat = options.chat or any(prompt.messages for prompt in prompts or ())
    template = ChatTemplate(tokenizer) if chat else None
    if prompts is None:
        Session(model, tokenizer, options.sampling, template, options.system).run()
        return 0
    requests = [_request(prompt, model, tokenizer, template, options) for prompt in prompts]
    starts = ["" if options.chat else prompt.text for prompt in prompts]
    write = _InOrder(starts) if options.out is None else lambda number, piece, last: None
    texts = write_texts(model, tokenizer, requests, options.sampling, batch_size=options.batch_size, write=write)
    if options.out is not None:
        _write_file(Path(options.out), prompts, texts)
    else:
        for _ in texts:
            pass
    return 0


def _check(options: GenerateOptions) -> None:
    """Raises ConfigError for options that do not go together or are out of range."""
    options.sampling.check()
    check(options.batch_size >= 1, f"--batch-size must be at least 1, but is {options.batch_size}")
    check(not options.prompt or options.file is None, "--prompt and --file do not go together")
    check(options.chat or options.system is None, "--system needs --chat")
    check(not options.prompt or options.format == "auto", "--format is for --file and standard input")
    if options.interactive:
        alone = not options.prompt and options.file is None and options.out is None
        check(alone, "--interactive does not go with --prompt, --file and --out")
    if options.out is not None:
        out = Path(options.out)
        check(out.parent.is_dir(), f"--out {out}: {out.parent} is not a folder")
        check_output("--out", out, lambda content: True)
        if out.is_file() and out.stat().st_size:
            raise ConfigError(f"--out {out} already exists; choose another name")


def _is_session(options: GenerateOptions) -> bool:
    if options.interactive:
        return True
    unasked = not options.prompt and options.file is None and options.out is None
    return unasked and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _prompts(options: GenerateOptions) -> list[Prompt]:
    if options.prompt:
        return [Prompt.of(text) for text in options.prompt]
    if options.file is not None or is_piped():
        return read_prompts(options.file or STANDARD_INPUT, options.format)
    return [Prompt.of("")]


def _request(
    prompt: Prompt,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    template: "ChatTemplate | None",
    options: GenerateOptions,
) -> "Request":
    from remoe.lab.generation.chat import SYSTEM, USER
    from remoe.lab.generation.text import Request, prompt_ids

    try:
        if template is None or not (options.chat or prompt.messages):
            return Request(prompt_ids(model, tokenizer, prompt.text))
        messages = list(prompt.messages) or [{"role": USER, "content": prompt.text}]
        if options.system is not None and messages[0]["role"] != SYSTEM:
            messages.insert(0, {"role": SYSTEM, "content": options.system})
        return Request(template.encode(messages), template.ending)
    except ConfigError as error:
        raise ConfigError(f"{prompt.place}: {error}" if prompt.place else str(error)) from error


class _InOrder:
    """Prints texts one after the other, each as it is written; later ones of a batch wait for those before them.

    Args:
        starts: what is printed before each text; an empty line comes between two texts.
    """

    def __init__(self, starts: list[str]) -> None:
        self.starts, self.current, self.begun = starts, 0, False
        self.waiting, self.done = [""] * len(starts), [False] * len(starts)

    def __call__(self, number: int, piece: str, last: bool) -> None:
        self.waiting[number] += piece
        self.done[number] = last
        while self.current < len(self.starts):
            text, self.waiting[self.current] = self.waiting[self.current], ""
            if not self.begun and (text or self.done[self.current]):
                self.begun = True
                text = "\n" * (self.current > 0) + self.starts[self.current] + text
            done = self.done[self.current]
            if text or done:
                emit(text + "\n" * done)
            if not done:
                return
            self.current, self.begun = self.current + 1, False


def _write_file(out: Path, prompts: list[Prompt], texts: "Iterator[Written]") -> None:
    """Writes what is there even if the rest is interrupted."""
    written: list[Written] = []
    terminal = sys.stderr.isatty()
    try:
        for text in texts:
            written.append(text)
            if terminal:
                print(f"\r{len(written)} of {len(prompts)} texts", end="", file=sys.stderr, flush=True)
    finally:
        rows = [
            prompt.row | {"text": text.text, "tokens": text.tokens, "ended": text.ended}
            for prompt, text in zip(prompts, written, strict=False)
        ]
        if rows:
            write_output(
                out,
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="backslashreplace"),
            )
            begin = "\r" if terminal else ""
            print(f"{begin}{len(rows)} of {len(prompts)} texts are in {out}", file=sys.stderr)
