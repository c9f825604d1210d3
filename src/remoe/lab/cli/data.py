"""`remoe data prepare` converts text into token shards; `remoe data check` verifies and describes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.table import Table
from tyro.conf import Positional, arg

from remoe.lab.cli.helps import PREPARE
from remoe.lab.cli.parsing import parse
from remoe.lab.console import Console
from remoe.lab.data.options import PrepareOptions
from remoe.lab.text import short_name


@dataclass(frozen=True, kw_only=True)
class PrepareArguments(PrepareOptions):
    """Convert text into token shards for `remoe train --data DIR`.

    If the command is stopped, give it again: it continues where it was.
    """

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="[SOURCE ...]")] = ("stdlib",)


@dataclass(frozen=True)
class CheckArguments:
    """Verify every byte of a prepared dataset, and show its contents."""

    path: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder written by `remoe data prepare`."""


def prepare_command(argv: list[str]) -> int:
    """Run `remoe data prepare`; returns the exit code, raises DataError or ConfigError for bad input."""
    options = parse(PrepareArguments, argv, prog="remoe data prepare", brief=PREPARE)
    from remoe.lab.data.preparation import prepare

    prepare(options)
    return 0


def check_command(argv: list[str]) -> int:
    """Run `remoe data check`; returns the exit code, raises DataError if anything is wrong with the data."""
    options = parse(CheckArguments, argv, prog="remoe data check")
    from remoe.lab.data.dataset import open_dataset, verify_hashes

    dataset = open_dataset(options.path)
    verify_hashes(dataset)
    dataset.load_tokenizer()
    table = Table("split", "domain", title=str(options.path), title_justify="left")
    for name in ("documents", "tokens", "MB", "tokens per byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for split in (dataset.train, dataset.validation):
        for domain, counts in [*split.record.domains.items(), ("all", split.record)]:
            table.add_row(
                split.name,
                short_name(domain),
                str(counts.documents),
                str(counts.tokens),
                f"{counts.bytes / 1e6:.2f}" if counts.bytes else "",
                f"{counts.tokens / counts.bytes:.3f}" if counts.bytes else "",
                end_section=domain == "all",
            )
    console = Console()
    console.print(table)
    console.print(
        f"vocabulary of {dataset.vocab_size}, {dataset.manifest.token_dtype}; fingerprint"
        f" {dataset.fingerprint[:16]}; all shards and the tokenizer are intact"
    )
    return 0
