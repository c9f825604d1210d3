"""`remoe eval`."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from remoe.cli.parsing import parse
from remoe.errors import ConfigError

PROG = "remoe eval"


@dataclass
class EvalOptions:
    """Loss, perplexity, bits per byte and sparsity of a trained model, overall and per domain."""

    run: tyro.conf.Positional[str]
    """A run's folder (its newest checkpoint is used) or one of its checkpoints."""
    data: str | None = None
    """Folder written by `remoe data prepare` with the same tokenizer; by default the run's own data."""
    split: str = "validation"
    """validation or train."""
    max_tokens: int | None = None
    """About so many tokens in all, shared out over the domains by size; everything by default."""
    batch_size: int = 32
    """Sequences per forward pass."""
    json: str | None = None
    """Also write the figures to this file."""


def eval_command(argv: list[str]) -> int:
    """Prints a table, a row a domain."""
    options = parse(EvalOptions, argv, prog=PROG)
    if options.split not in ("validation", "train"):
        raise ConfigError(f"unknown --split {options.split!r}; choose one of: validation, train")
    if options.batch_size < 1 or (options.max_tokens is not None and options.max_tokens < 1):
        raise ConfigError("--batch-size and --max-tokens must be at least 1")

    from remoe.cli.quiet import quiet_transformers
    from remoe.training.evaluate_run import evaluate_run

    quiet_transformers()
    checkpoint, dataset, results = evaluate_run(
        options.run,
        options.data,
        split=options.split,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
    )
    _print_table(f"{checkpoint} on {options.split} data of {dataset}", results)
    if options.json:
        Path(options.json).write_text(json.dumps({"checkpoint": str(checkpoint), **results}, indent=2))
    return 0


def _print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", title=title, title_justify="left")
    for column in ("loss", "perplexity", "bits per byte", "sparsity", "tokens"):
        table.add_column(column, justify="right")
    for domain, row in results.items():
        table.add_row(
            domain,
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['sparsity']:.4f}",
            f"{row['tokens']:,}",
        )
    Console(soft_wrap=True).print(table)
