"""`remoe plan`."""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from remoe.costs import ROUTER_SIZES, ModelSizes, Plan, check_sizes, executed_experts, plan
from remoe.errors import ConfigError, check
from remoe.lab.cli.parsing import check_router, importing, parse
from remoe.lab.cli.plan_mesh import MeshOptions, mesh_job, print_mesh
from remoe.lab.training.presets import preset

PROG = "remoe plan"
DENSE_STAGE = "  while half of the experts are active"


@dataclass
class PlanOptions(MeshOptions):
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
    check_router(options.router)
    settings = preset(options.preset)
    seq_len = settings["seq_len"] if options.seq_len is None else options.seq_len
    micro_batch_size = settings["micro_batch_size"] if options.micro_batch_size is None else options.micro_batch_size
    if seq_len < 1 or micro_batch_size < 1:
        raise ConfigError("--seq-len and --micro-batch-size must be at least 1")
    for name in ("gpus", "gpu", "batch_size"):
        if options.mesh is None and getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} needs --mesh, for example --mesh fsdp=8")

    def planned(router: str) -> Plan:
        return plan(_sizes(options, settings, router), seq_len, micro_batch_size)

    columns = {router: planned(router) for router in dict.fromkeys((options.router, "dense"))}
    title = (
        f"{options.preset}, E {options.num_experts}, k {options.k}, G {options.granularity}: "
        f"vocabulary {settings['vocab_size']:,}, sequence {seq_len}, micro-batch {micro_batch_size}"
    )
    spread = None
    if options.mesh is not None:  # its mistakes are found before anything is printed
        sizes = _sizes(options, settings, options.router)
        spread = mesh_job(options, options.router, sizes, seq_len, micro_batch_size, settings["batch_size"])
    _print_table(title, columns)
    if spread is not None:
        print_mesh(options, *spread)
    return 0


def _sizes(options: PlanOptions, settings: dict, router: str) -> ModelSizes:
    """The sizes of the preset's model; those with a router of a user's own are known once its class is loaded."""
    model = settings["model"]
    D, heads, d_ffn = model["hidden_size"], model["num_attention_heads"], options.intermediate_size
    E, k, G, shared = options.num_experts, options.k, options.granularity, options.shared_expert_size
    if router not in ROUTER_SIZES or os.environ.get("REMOE_ROUTERS"):
        with importing():
            from remoe.models.configuration_remoe import RemoeConfig
            from remoe.models.plan import sizes_of

        names = {"num_experts": E, "num_experts_per_tok": k, "granularity": G, "shared_expert_size": shared}
        config = RemoeConfig(**model | names, intermediate_size=d_ffn, vocab_size=settings["vocab_size"], router=router)
        return sizes_of(config)
    d_ffn = 4 * D if d_ffn is None else d_ffn
    check_sizes(num_experts=E, k=k, granularity=G, d_ffn=d_ffn, shared=shared)
    known = ROUTER_SIZES[router]
    check(not known.merges or k * G == 1, f"{router} merges its experts into one: k times granularity must be 1")
    return ModelSizes(
        vocab_size=settings["vocab_size"],
        d_model=D,
        layers=model["num_hidden_layers"],
        heads=heads,
        groups=model["num_key_value_heads"],
        head_dim=D // heads,
        d_ffn=d_ffn,
        num_experts=E,
        k=k,
        granularity=G,
        shared=shared,
        networks=E * G if known.routes_pairs or known.merges else 1,
        expert_width=d_ffn * (E if known.network == "all" else k),
        router_shapes=((E * G, D),) * known.has_weights + ((E * G,),) * known.has_scale,
        executed_experts=executed_experts(known, E, k),
        steered=known.steered,
        routes_pairs=known.routes_pairs,
        merges=known.merges,
        balances=known.balances,
    )


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
        ("training memory, at most", lambda p: gib(p.training_bytes)),
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
