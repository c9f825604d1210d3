"""results.md: the tables of a comparison, for people."""

import statistics
from collections.abc import Mapping, Sequence

from remoe.compare.experiment import Experiment, describe
from remoe.compare.record import CHUNK, RoutingFigures
from remoe.compare.results import Results, Row

EQUAL_TOKENS = "Equal tokens"
EQUAL_FLOPS = "Equal training FLOPs"


def markdown(
    experiment: Experiment,
    results: Results,
    routing: Mapping[str, Sequence[RoutingFigures]],
    top_tokens: Mapping[str, Sequence[Sequence[Sequence[str]]]],
    figures: Mapping[str, str],
    data: str,
    machines: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The report.

    Args:
        experiment: what was asked for.
        results: its numbers.
        routing: measures of routing of each seed, by the name of variant and point.
        top_tokens: of layers and experts, for the systems whose routing is drawn.
        figures: title of each figure and its file, relative to the report.
        data: one line about the data.
        machines: one line for each machine that runs were trained on.
        notes: what a reader must know of single runs.
    """
    lines = [f"# {experiment.title}", "", data, ""]
    lines += [f"Trained on: {machine}" for machine in machines] + [""]
    lines += [
        "Validation loss in nats per token, mean ± standard deviation over seeds. FLOPs count the pairs that were",
        "really routed, from the first step on.",
        "",
    ]
    if results.missing:
        lines += [f"**Not finished ({len(results.missing)}):** {', '.join(results.missing)}.", ""]
    lines += [line for note in notes for line in (f"**Note:** {note}", "")]
    for title, rows in ((EQUAL_TOKENS, results.equal_tokens), (EQUAL_FLOPS, results.equal_flops)):
        if rows:
            lines += [f"## {title}", "", *_cost_table(experiment, rows), ""]
            lines += [f"### {title}: loss per domain", "", *_domain_table(experiment, rows), ""]
    if routing:
        lines += ["## Routing", "", *_routing_table(routing), ""]
    for name, layers in top_tokens.items():
        lines += [f"<details><summary>{name}: tokens that each expert takes most surely</summary>", ""]
        lines += [*_token_table(layers), "", "</details>", ""]
    if figures:
        lines += ["## Figures", ""]
        lines += [line for title, file in figures.items() for line in (f"![{title}]({file})", "", title, "")]
    return "\n".join(lines).rstrip() + "\n"


def row_name(variant: str, point: dict) -> str:
    """`relu`, or `relu, num_experts 8`."""
    return ", ".join([variant, *([describe(tuple(point.items()))] if point else [])])


def _cost_table(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    header = [
        "system", "seeds", "steps", "validation loss", f"minus {experiment.reference}", "active parameters",
        "total parameters", "FLOPs per token", "training FLOPs", "tokens/s", "peak memory", "S", "settled at step",
        "deviation of S",
    ]  # fmt: skip
    cells = [
        [
            row_name(row.variant, row.point),
            str(len(row.seeds)),
            _span(row.steps),
            str(row.validation_loss),
            "" if row.over_reference is None else _signed(row),
            f"{row.active_parameters / 1e6:.2f}M",
            f"{row.total_parameters / 1e6:.2f}M",
            f"{row.flops_per_token / 1e6:.2f}M",
            f"{row.flops:.3e}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_memory_bytes / 2**30:.2f} GiB",
            f"{row.sparsity:.4f}",
            ", ".join("not" if step is None else str(step) for step in row.settling_steps),
            "" if row.sparsity_deviation is None else f"{row.sparsity_deviation:.4f}",
        ]
        for row in rows
    ]
    return _table(header, cells)


def _domain_table(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    domains = list(rows[0].domains)
    cells = [
        [row_name(row.variant, row.point), *(f"{row.domains[domain].mean:.3f}" for domain in domains)] for row in rows
    ]
    return _table(["system", *domains], cells)


def _routing_table(routing: Mapping[str, Sequence[RoutingFigures]]) -> list[str]:
    columns = {
        "experts under 1/64": ("inactive_experts", ".0f"),
        "busiest / mean": ("load_imbalance", ".2f"),
        "specialisation": ("specialisation", ".4f"),
        "active experts ~ frequency": ("frequency_correlation", "+.2f"),
        f"sparsity of {CHUNK} tokens": ("chunk_sparsity", ".3f"),
        "reuse by the next token": ("expert_reuse", ".3f"),
        "flip rate": ("flip_rate", ".5f"),
    }
    cells = [
        [
            name,
            str(len(seeds)),
            *(_spread([getattr(figures, field) for figures in seeds], form) for field, form in columns.values()),
            " ".join(_mean(layer) for layer in zip(*(figures.sparsity_per_layer for figures in seeds), strict=True)),
        ]
        for name, seeds in routing.items()
    ]
    return _table(["system", "seeds", *columns, "S per layer"], cells)


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "".join(f"{value:{form}}" for value in known)
    return f"{statistics.mean(known):{form}} ± {statistics.stdev(known):{form.lstrip('+')}}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def _token_table(layers: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    cells = [
        [str(layer), str(expert), " ".join(_code(token) for token in tokens)]
        for layer, experts in enumerate(layers)
        for expert, tokens in enumerate(experts)
    ]
    return _table(["layer", "expert", "tokens"], cells)


def _code(token: str) -> str:
    """A token as inline code in a table's cell; what cannot be seen is written as Python does."""
    text = repr(token)[1:-1].replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _signed(row: Row) -> str:
    spread = row.over_reference
    return f"{spread.mean:+.4f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def _span(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low} to {high}"
