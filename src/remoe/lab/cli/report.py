"""`remoe report`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.helps import REPORT
from remoe.lab.cli.parsing import importing, parse, waiting
from remoe.lab.generation import Sampling, SamplingOptions
from remoe.lab.outputs import check_output, is_report

PROG = "remoe report"
LONGEST_GENERATION = 10_000  # tokens


@dataclass
class ReportOptions:
    """Write an HTML page that shows how a model routes: text coloured by expert, loads, measures and figures.

    With several models, the page shows the same text in all of them, and their differences to the first. The page is
    one file that needs no network; open it in a browser.
    """

    model: Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="MODEL")]
    """Folder of a run (its newest checkpoint is used), one of its checkpoints, or a model's folder with its tokenizer:
    exported or converted by this package, or a mixture of transformers that `remoe convert relufy` knows. Or a record
    that `remoe record` wrote. Two to six of these are compared; if their tokenizers differ, on raw text or a
    prompt."""
    data: str | None = None
    """Folder written by `remoe data prepare` with the model's tokenizer, or raw text: a file or a folder. By default
    the data of the run, of several the first one's; required for a model's folder."""
    prompt: str | None = None
    """Text to read instead of --data."""
    generate: int = 0
    """Tokens that the model writes after the prompt, at most 10,000. The page plays how they were written, with the
    experts that ran meanwhile. The sampling options below belong to it."""
    out: str | None = None
    """File to write. By default report.html in the folder of the run or model; for a checkpoint report-step-N.html in
    the folder of its run; for a record its name with .html. For several models report-with-NAMES.html in the folder of
    the first, or beside its record."""
    max_tokens: int = 200_000
    """Tokens for the figures (approximate); of prepared data divided among the domains in proportion to their size, of
    raw text the first ones."""
    excerpt: int = 2000
    """Tokens of each domain that are shown as text."""
    effect_tokens: int = 0
    """Tokens, divided equally among the domains, on which each expert is switched off to measure its effect on the
    loss. That takes a forward pass for every expert that has one of the tokens. Not measured by default."""
    dial_tokens: int = 0
    """Tokens, divided equally among the domains, on which loss and speed are measured at several gate thresholds and
    caps on a token's experts. That takes about forty forward passes. Not measured by default."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def report_command(argv: list[str]) -> int:
    """Writes the page and prints its path."""
    options = parse(ReportOptions, argv, prog=PROG, brief=REPORT)
    if options.max_tokens < 1 or options.excerpt < 1:
        raise ConfigError("--max-tokens and --excerpt must be at least 1")
    if options.effect_tokens < 0 or options.dial_tokens < 0:
        raise ConfigError("--effect-tokens and --dial-tokens must not be negative")
    if not options.model:
        raise ConfigError(f"MODEL missing (see {PROG} --help)")
    if len(options.model) > 1 and (options.effect_tokens or options.dial_tokens or options.generate):
        raise ConfigError("--effect-tokens, --dial-tokens and --generate are for one model")
    if options.data is not None and options.prompt is not None:
        raise ConfigError("--data and --prompt do not go together")
    generation = _generation(options)
    out = None if options.out is None else Path(options.out)
    if out is not None:  # checked before the work, not after it
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: {out.parent} is not a folder")
        check_output("--out", out, is_report)

    with importing():
        from remoe.lab.report import write_report
        from remoe.lab.report.several import write_comparison

    sizes = {"max_tokens": options.max_tokens, "excerpt_tokens": options.excerpt}
    with waiting("recording the routing and drawing"):
        if len(options.model) > 1:
            page = write_comparison(options.model, options.data, out, prompt=options.prompt, **sizes)
        else:
            sizes |= {"effect_tokens": options.effect_tokens, "dial_tokens": options.dial_tokens}
            page = write_report(
                options.model[0], options.data, out, prompt=options.prompt, generation=generation, **sizes
            )
    print(f"report       {page}\nopen it in a browser")
    return 0


def _generation(options: ReportOptions) -> SamplingOptions | None:
    if not 0 <= options.generate <= LONGEST_GENERATION:
        raise ConfigError(f"--generate must be from 0 to {LONGEST_GENERATION:,}, but is {options.generate}")
    if options.generate and options.prompt is None:
        raise ConfigError("--generate needs a --prompt")
    if not options.generate:
        if options.sampling != Sampling():
            raise ConfigError("the sampling options belong to --generate, which is not given")
        return None
    sampling = SamplingOptions(max_new_tokens=options.generate, **asdict(options.sampling))
    sampling.check()
    return sampling
