"""`remoe report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import parse

PROG = "remoe report"


@dataclass
class ReportOptions:
    """Write a page in which one sees how a trained model routes: text coloured by experts, loads, measures, figures.

    One HTML file that needs no network, to be opened in a browser.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder (its newest checkpoint is used), one of its checkpoints, or a model's folder with its tokenizer,
    as `remoe export` writes it."""
    data: str | None = None
    """Folder written by `remoe data prepare` with the same tokenizer; by default the run's own data, which a model's
    folder does not have."""
    out: str | None = None
    """The file; by default report.html in that folder, or report-step-N.html in its run's for a checkpoint."""
    max_tokens: int = 200_000
    """About so many validation tokens for the numbers, shared out over the domains by size."""
    excerpt: int = 200
    """Tokens of each domain that are shown as text, at most the model's window."""


def report_command(argv: list[str]) -> int:
    """Writes the page and says where."""
    options = parse(ReportOptions, argv, prog=PROG)
    if options.max_tokens < 1 or options.excerpt < 1:
        raise ConfigError("--max-tokens and --excerpt must be at least 1")
    out = None if options.out is None else Path(options.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):  # found out before the work, not after it
        raise ConfigError(f"--out {out} is a folder" if out.is_dir() else f"--out {out}: {out.parent} is not a folder")

    from remoe.lab.cli.parsing import quiet_transformers
    from remoe.lab.report import write_report

    quiet_transformers()
    page = write_report(options.run, options.data, out, max_tokens=options.max_tokens, excerpt_tokens=options.excerpt)
    print(f"report       {page}   (open it in a browser)")
    return 0
