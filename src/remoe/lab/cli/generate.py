"""`remoe generate`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from remoe.lab.cli.parsing import importing, parse
from remoe.lab.generation import SamplingOptions
from remoe.lab.text import lines

PROG = "remoe generate"


@dataclass
class GenerateOptions:
    """Generate text with a trained model. The same seed gives the same text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run (its newest checkpoint is used), one of its checkpoints, or the folder of any transformers
    language model with its tokenizer."""
    prompt: str = ""
    """Text to continue; an empty prompt starts a new document."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)


def generate_command(argv: list[str]) -> int:
    """Prints the prompt and the model's continuation."""
    options = parse(GenerateOptions, argv, prog=PROG)
    options.sampling.check()

    with importing():
        from remoe.lab.generation import generate_text
        from remoe.lab.training.load import load_model

    model, tokenizer, _ = load_model(options.run)
    text = options.prompt + generate_text(model, tokenizer, options.prompt, options.sampling)
    print(lines(text) if sys.stdout.isatty() else text)
    return 0
