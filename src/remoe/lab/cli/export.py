"""`remoe export`."""

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from remoe.errors import check
from remoe.lab.cli.parsing import importing, parse

PROG = "remoe export"


@dataclass
class ExportOptions:
    """Write a trained model to a folder that transformers loads without remoe, with trust_remote_code=True.

    A transformers model that `remoe convert relufy` converted and a run trained is loaded by remoe.load_relufied.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run (its newest checkpoint is exported), or one of its checkpoints."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """New or empty folder to write to: weights, tokenizer, code, and a model card with plots."""
    max_experts: int | None = None
    """The most experts that a token may use, those with the largest gates; the layers then call their experts as
    transformers' mixtures do. The card has the validation loss with and without this cap. By default there is none."""
    quantize: Literal["int8", "int4"] | None = None
    """int8: write the weights of attention and experts in 8 bits, by torchao. int4: write those of the experts in 4
    bits. The card has the validation loss before and after. By default they stay as they are."""
    license: str | None = None
    """The model's license for the card, by its name on the Hugging Face Hub, such as apache-2.0."""
    trim_vocabulary: bool = False
    """Leave out the rows of embeddings and head that no token has, which training adds to round the vocabulary up.
    Programs that read the head's weights and not the model's logits, such as TRL's DPO and GRPO, need this."""
    push: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME")] = None
    """Upload the folder to this model repository on the Hugging Face Hub, which is created if it does not exist. The
    token is that of `hf auth login` or HF_TOKEN."""
    private: bool = False
    """With --push: only the owner sees the repository."""


def export_command(argv: list[str]) -> int:
    """Writes the folder, prints how to load it, and uploads it if asked to."""
    options = parse(ExportOptions, argv, prog=PROG)

    with importing():
        from remoe.convert.relufy.model import is_relufied
        from remoe.lab.export import export_run
        from remoe.lab.export.push import check_repository, push_folder

    check(options.push is not None or not options.private, "--private needs --push OWNER/NAME")
    if options.push is not None:
        check_repository(options.push)  # before the work, not after it
    sizes = options.max_experts, options.quantize, options.license
    out = export_run(options.run, options.out, *sizes, trim=options.trim_vocabulary)
    if is_relufied(out):
        print(f"wrote {out}; to load it:\n  remoe.load_relufied({str(out)!r})")
    else:
        print(f"wrote {out}; to load it without remoe:")
        print(f"  AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")
    if options.quantize is None:  # such weights take no gradients
        print(f"to train it further:\n  remoe train --from {shlex.quote(str(out))} --data DATA")
    if options.push is not None:
        print(f"pushed to {push_folder(out, options.push, private=options.private)}")
    return 0
