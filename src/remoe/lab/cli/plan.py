"""`remoe plan`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import importing, parse
from remoe.lab.training.presets import preset

PROG = "remoe plan"
DENSE_STAGE = "  while half of the experts are active"


@dataclass
class PlanOptions:
    """Show the parameters, FLOPs and memory of a model without building it, next to those of its dense counterpart."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    """Model size: tiny, mini, 182m, 469m or 978m."""
    router: str = "relu"
    """Name of a router, as in `remoe train --router`."""
    num_experts: int = 8
    """Number of experts E per layer, before the split by granularity."""
    k: int = 1
    """Target number of active experts per token, before the split by granularity."""
    granularity: int = 1
    """Split each expert into this many narrower ones, and activate this many times as many."""
    intermediate_size: int | None = None
    """Width of one expert before the split by granularity; the preset's by default."""
    shared_expert_size: int = 0
    """Width of a shared expert, which every token uses in addition to the routed ones; 0 for none."""
    seq_len: int | None = None
    """Tokens per sequence; the preset's by default."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward pass; the preset's by default."""


def plan_command(argv: list[str]) -> int:
    """Prints the figures of the model and of its dense counterpart."""
    options = parse(PlanOptions, argv, prog=PROG)
    settings = preset(options.preset)
    seq_len = settings["seq_len"] if options.seq_len is None else options.seq_len
    micro_batch_size = settings["micro_batch_size"] if options.micro_batch_size is None else options.micro_batch_size
    if seq_len < 1 or micro_batch_size < 1:
        raise ConfigError("--seq-len and --micro-batch-size must be at least 1")

    model = settings["model"] | {"shared_expert_size": options.shared_expert_size}
    if options.intermediate_size is not None:
        model["intermediate_size"] = options.intermediate_size

    with importing():
        from remoe.models.configuration_remoe import RemoeConfig
        from remoe.models.plan import plan

    def planned(router: str):
        config = RemoeConfig(
            **model,
            vocab_size=settings["vocab_size"],
            router=router,
            num_experts=options.num_experts,
            num_experts_per_tok=options.k,
            granularity=options.granularity,
        )
        return plan(config, seq_len, micro_batch_size)

    columns = {router: planned(router) for router in dict.fromkeys((options.router, "dense"))}
    title = (
        f"{options.preset}, E {options.num_experts}, k {options.k}, G {options.granularity}: "
        f"vocabulary {settings['vocab_size']:,}, sequence {seq_len}, micro-batch {micro_batch_size}"
    )
    _print_table(title, columns)
    return 0


def _print_table(title: str, columns: dict) -> None:
    from rich.table import Table

    from remoe.lab.console import Console

    def gib(count: int) -> str:
        return f"{count / 2**30:,.2f} GiB"

    rows = [
        ("parameters, total", lambda p: f"{p.total_parameters / 1e6:,.1f}M"),
        ("parameters, active per token", lambda p: f"{p.active_parameters / 1e6:,.1f}M"),
        ("GFLOPs per sequence, forward + backward", lambda p: f"{p.flops_per_sequence / 1e9:,.1f}"),
        (DENSE_STAGE, lambda p: f"{p.dense_stage_flops_per_sequence / 1e9:,.1f}"),
        ("weights, gradients, AdamW (float32)", lambda p: gib(p.state_bytes)),
        ("activations of a micro-batch (float32)", lambda p: gib(p.activation_bytes)),
        (DENSE_STAGE, lambda p: gib(p.dense_stage_activation_bytes)),
        ("training memory, at most", lambda p: gib(p.state_bytes + p.dense_stage_activation_bytes)),
    ]
    if all(
        p.dense_stage_flops_per_sequence == p.flops_per_sequence for p in columns.values()
    ):  # no column has a dense stage
        rows = [(label, value) for label, value in rows if label != DENSE_STAGE]
    table = Table("", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for label, value in rows:
        table.add_row(label, *(value(p) for p in columns.values()))
    Console().print(table)
