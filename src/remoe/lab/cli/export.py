"""`remoe export`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from remoe.lab.cli.parsing import parse

PROG = "remoe export"


@dataclass
class ExportOptions:
    """Write a trained model to a folder that plain transformers loads with trust_remote_code=True."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder (its newest checkpoint is used) or one of its checkpoints."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Folder to write: weights, tokenizer, code, and a model card with plots. A new or empty one."""


def export_command(argv: list[str]) -> int:
    """Writes the folder and says how to load it."""
    options = parse(ExportOptions, argv, prog=PROG)

    from remoe.lab.cli.parsing import quiet_transformers
    from remoe.lab.export import export_run

    quiet_transformers()
    out = export_run(options.run, options.out)
    print(f"wrote {out}; without remoe it loads by")
    print(f"  AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")
    return 0
