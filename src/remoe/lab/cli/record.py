"""`remoe record`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import importing, parse, waiting
from remoe.lab.outputs import check_output, is_parquet

if TYPE_CHECKING:
    from remoe.lab.analysis.record import RoutingRecord

PROG = "remoe record"


@dataclass
class RecordOptions:
    """Record which experts a mixture of experts uses for each token of a text: experts, gates and loss, in Parquet.

    `remoe report R.parquet` shows the record. docs/record.md describes the columns.
    """

    model: Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="MODEL")]
    """Folder of a run, of one of its checkpoints, or of a model with its tokenizer: exported or converted by this
    package, or a mixture of transformers that `remoe convert relufy` knows. Or files of other programs to import:
    arrays of vLLM or SGLang (.npy, .npz), or traces of Megatron-LM (.jsonl)."""
    out: str
    """Parquet file to write."""
    data: str | None = None
    """Folder written by `remoe data prepare` with the model's tokenizer, or raw text: a file or a folder. By default
    the data of the run."""
    prompt: str | None = None
    """Text to read instead of --data."""
    split: str = "validation"
    """Part of prepared data: validation or train."""
    max_tokens: int | None = None
    """Tokens to read (approximate); of prepared data divided among the domains in proportion to their size, of raw text
    the first ones. All by default."""
    num_experts: int | None = None
    """Experts per layer, for files of other programs, which do not say it."""


def record_command(argv: list[str]) -> int:
    """Writes the record and prints its size."""
    options = parse(RecordOptions, argv, prog=PROG)
    if options.split not in ("validation", "train"):
        raise ConfigError(f"unknown --split {options.split!r}; choose one of: validation, train")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConfigError("--max-tokens must be at least 1")
    if options.data is not None and options.prompt is not None:
        raise ConfigError("--data and --prompt do not go together")
    out = Path(options.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: {out.parent} is not a folder")
    check_output("--out", out, is_parquet)

    with importing():
        from remoe.lab.analysis.imported import import_routing, is_import
        from remoe.lab.analysis.source import open_source
        from remoe.lab.files import replacing

    foreign = [is_import(path) for path in options.model]
    if any(foreign):
        _check_import(options, foreign)
        with replacing(out) as file:
            made = import_routing([Path(path) for path in options.model], file, options.num_experts)
    else:
        if len(options.model) > 1 or options.num_experts is not None:
            raise ConfigError("several files and --num-experts are for files of other programs; name one model")
        with waiting("recording the routing"):
            sizes = {"split": options.split, "max_tokens": options.max_tokens}
            source = open_source(options.model[0], options.data, options.prompt, **sizes)
            if source.mixture is None:
                router = source.model.config.router
                raise ConfigError(f"router {router!r} does not send single tokens to experts: there is no routing")
            with replacing(out) as file:
                made = source.record(file)
    _say(out, made)
    return 0


def _check_import(options: RecordOptions, foreign: list[bool]) -> None:
    if not all(foreign):
        raise ConfigError(f"{options.model[foreign.index(False)]} is not a file of another program, as the others are")
    if options.num_experts is None or options.num_experts < 1:
        raise ConfigError("--num-experts, at least 1, is needed for files of other programs, which do not say it")
    if options.data is not None or options.prompt is not None or options.max_tokens is not None:
        raise ConfigError("--data, --prompt and --max-tokens do not go with files of other programs")


def _say(out: Path, made: "RoutingRecord") -> None:
    about = made.about
    print(
        f"record       {out}\n"
        f"             {about.tokens:,} tokens, {about.layers} layers of {about.experts} experts\n"
        f"next         remoe report {out}"
    )
