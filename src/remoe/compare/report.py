"""results.md: the tables of a comparison, for people."""

from collections.abc import Sequence

from remoe.compare.experiment import Experiment, describe
from remoe.compare.record import CHUNK, RoutingFigures
from remoe.compare.results import Results, Row

EQUAL_TOKENS = "Equal tokens"
EQUAL_FLOPS = "Equal training FLOPs"


def markdown(
    experiment: Experiment,
    results: Results,
    routing: dict[str, RoutingFigures],
    figures: dict[str, str],
    data: str,
    machines: Sequence[str],
) -> str:
    """The report.

    Args:
        experiment: what was asked for.
        results: its numbers.
        routing: measures of routing by the name of variant and point.
        figures: title of each figure and its file, relative to the report.
        data: one line about the data.
        machines: one line for each machine that runs were trained on.
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
    for title, rows in ((EQUAL_TOKENS, results.equal_tokens), (EQUAL_FLOPS, results.equal_flops)):
        if rows:
            lines += [f"## {title}", "", *_cost_table(experiment, rows), ""]
            lines += [f"### {title}: loss per domain", "", *_domain_table(experiment, rows), ""]
    if routing:
        lines += ["## Routing", "", *_routing_table(experiment, routing), ""]
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


def _routing_table(experiment: Experiment, routing: dict[str, RoutingFigures]) -> list[str]:
    header = [
        "system", "experts under 1/64", "busiest / mean", "specialisation", "active experts ~ frequency",
        f"sparsity of {CHUNK} tokens", "reuse by the next token", "flip rate", "S per layer",
    ]  # fmt: skip
    cells = [
        [
            name,
            str(figures.inactive_experts),
            f"{figures.load_imbalance:.2f}",
            f"{figures.specialisation:.4f}",
            "" if figures.frequency_correlation is None else f"{figures.frequency_correlation:+.2f}",
            f"{figures.chunk_sparsity:.3f}",
            f"{figures.expert_reuse:.3f}",
            "" if figures.flip_rate is None else f"{figures.flip_rate:.5f}",
            " ".join(f"{sparsity:.3f}" for sparsity in figures.sparsity_per_layer),
        ]
        for name, figures in routing.items()
    ]
    return _table(header, cells)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _signed(row: Row) -> str:
    spread = row.over_reference
    return f"{spread.mean:+.4f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def _span(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low} to {high}"
