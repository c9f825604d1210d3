"""`remoe generate`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from remoe.lab.cli.parsing import parse
from remoe.lab.generation import SamplingOptions

PROG = "remoe generate"


@dataclass
class GenerateOptions:
    """Write text with a trained model; the same seed writes the same text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder (its newest checkpoint is used), one of its checkpoints, or the folder of any transformers
    language model with its tokenizer."""
    prompt: str = ""
    """Text to go on from; empty for a new document."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)


def generate_command(argv: list[str]) -> int:
    """Prints the prompt and what the model writes after it."""
    options = parse(GenerateOptions, argv, prog=PROG)
    options.sampling.check()

    from remoe.lab.cli.parsing import quiet_transformers
    from remoe.lab.generation import generate_text
    from remoe.lab.training.load import load_model

    quiet_transformers()
    model, tokenizer, _ = load_model(options.run)
    print(options.prompt + generate_text(model, tokenizer, options.prompt, options.sampling))
    return 0
