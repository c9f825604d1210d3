"""results.md: the tables of a comparison, for people."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence

from remoe.lab.analysis.summary import CHUNK
from remoe.lab.compare.budget import TOLERANCE
from remoe.lab.compare.experiment import Experiment, describe
from remoe.lab.compare.record import RunRecord
from remoe.lab.compare.results import AFTER, Results, Row, Spread
from remoe.routing import ROUTERS
from remoe.stages import first_sparse_step

NO_PENALTY = 1e-6  # nats, below which a penalty does nothing
IDLE_SHARE = 0.1  # of steps without a penalty, from which on a reader is told
EQUAL_TOKENS = "Equal tokens"
EQUAL_FLOPS = "Equal training FLOPs"
NOT_MEASURED = "not measured"


def markdown(
    experiment: Experiment,
    results: Results,
    records: Mapping[str, Sequence[RunRecord]],
    figures: Mapping[str, str],
    data: str,
) -> str:
    """The report.

    Args:
        experiment: what was asked for.
        results: its numbers.
        records: of each seed's run at equal tokens, by the name of variant and point.
        figures: title of each figure and its file, relative to the report.
        data: one line about the data.
    """
    lines = [f"# {experiment.title}", "", data, ""]
    days = " to ".join(dict.fromkeys([results.dates[0], results.dates[-1]])) if results.dates else "days not recorded"
    lines += [f"Trained on ({days}):", ""]
    lines += [f"{number}. {machine}" for number, machine in enumerate(results.machines, 1)] + [""]
    lines += [
        "Validation loss in nats per token, mean ± standard deviation over seeds. FLOPs count the pairs that were",
        f"really routed, from the first step on; `of {experiment.reference}'s`: as a multiple of the reference's.",
        "`executed`: the same with the up projections that were computed again to save memory, which FLOPs leave out.",
        f"`S, steps > {AFTER}`: mean ± deviation of a training step's sparsity. `minutes`: of all training steps,",
        "in brackets of those before stage III. Time and memory of different machines, or of one that did other things",
        "too, do not compare.",
        "",
    ]
    if results.missing:
        lines += [f"**Not finished ({len(results.missing)}):** {', '.join(results.missing)}.", ""]
    lines += [line for note in _notes(results, records) for line in (f"**Note:** {note}", "")]
    for title, rows in ((EQUAL_TOKENS, results.equal_tokens), (EQUAL_FLOPS, results.equal_flops)):
        if rows:
            lines += [f"## {title}", "", *_loss_table(experiment, rows), ""]
            lines += [f"### {title}: cost", "", *_cost_table(rows), ""]
            lines += [f"### {title}: loss per domain", "", *_domain_table(rows), ""]
            if evaluated := [row for row in rows if row.zero_shot]:
                lines += [f"### {title}: zero-shot accuracy", "", *_task_table(evaluated), ""]
    if routed := {name: seeds for name, seeds in records.items() if seeds[0].routing is not None}:
        lines += ["## Routing", "", *_routing_table(routed), ""]
        lines += [
            "`busiest / mean`, `specialisation` and `reuse by the next token` are means over the layers weighted by",
            f"their routed pairs; `active experts ~ frequency` (a rank correlation) and `sparsity of {CHUNK} tokens`",
            "count all layers alike.",
            "",
        ]
        if any(record.mean_flip_rates() is None for seeds in routed.values() for record in seeds):
            lines += ["Flips are measured while a run trains, with `validate: {flips_every: N}`.", ""]
    for name in (name for name in routed if name in shown(experiment)):
        # Not every old record has them.
        if record := next((record for record in routed[name] if record.routing.top_tokens), None):
            of = f"{name}, seed {record.options['seed']}"
            lines += [f"<details><summary>{of}: tokens that each expert takes most surely</summary>", ""]
            lines += [*_token_table(record.routing.top_tokens), "", "</details>", ""]
    if figures:
        lines += ["## Figures", ""]
        lines += [line for title, file in figures.items() for line in (f"![{title}]({file})", "", title, "")]
    return "\n".join(lines).rstrip() + "\n"


def shown(experiment: Experiment) -> list[str]:
    """Names of the systems whose routing is drawn: the chosen variants at the first point."""
    return [row_name(variant, dict(experiment.points[0])) for variant in experiment.figures]


def _notes(results: Results, records: Mapping[str, Sequence[RunRecord]]) -> Iterator[str]:
    """What a reader must know of single runs."""
    for row in results.equal_tokens:
        if not row.causal:
            name = row_name(row.variant, row.point)
            yield f"tokens of {name} see later ones at evaluation too: its loss does not compare."
    for row in results.equal_flops:
        if missed := [f"{ratio:.3f}" for ratio in row.over_budget_seeds if abs(ratio - 1) > TOLERANCE]:
            name = row_name(row.variant, row.point)
            yield f"{name} at equal FLOPs spent {', '.join(missed)} times the budget, not the same."
    for name, seeds in records.items():
        for record in seeds:
            if ROUTERS[record.summary["router"]].steered:
                yield from _steering_notes(f"{name}, seed {record.options['seed']}", record)


def _steering_notes(name: str, record: RunRecord) -> Iterator[str]:
    course, target = record.course, record.summary["target_sparsity"]
    if target == 0:  # k = E: nothing to steer to
        return
    idle = [a * b < NO_PENALTY for a, b in zip(course["lambda"], course["reg_loss"], strict=True)]
    idle = idle[first_sparse_step(course["sparsity"], target) - 1 :]  # before it lambda still rises from its start
    if not idle:
        reached = f"S {course['sparsity'][-1]:.2f} at its end, wanted {target:.3g}"
        fixed = record.options.get("sparsity.rule") == "none"
        why = "lambda stays as it is" if fixed else "too few steps"
        yield f"{name}, never became sparse ({reached}): {why}; its losses say nothing yet about routers."
    elif (share := statistics.mean(idle[len(idle) // 2 :])) > IDLE_SHARE:
        size = f"under {NO_PENALTY:g} nats in {share:.0%} of the steps of the second half of its sparse stage"
        yield f"the penalty of {name}, is {size}: nothing steers S there."


def row_name(variant: str, point: dict) -> str:
    """`relu`, or `relu, num_experts 8`."""
    return ", ".join([variant, *([describe(tuple(point.items()))] if point else [])])


def _loss_table(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    header = [
        "system", "seeds", "steps", "validation loss", f"minus {experiment.reference}", "mean over domains",
        "FLOPs per token", "training FLOPs", f"of {experiment.reference}'s", "executed", "active parameters",
        "total parameters",
    ]  # fmt: skip
    cells = [
        [
            row_name(row.variant, row.point),
            str(len(row.seeds)),
            _span(row.steps),
            str(row.validation_loss),
            _over_reference(row),
            str(row.domain_mean),
            f"{row.flops_per_token / 1e6:.2f}M",
            f"{row.flops:.3e}",
            "" if row.over_budget is None else f"{row.over_budget:.3f}",
            "" if row.over_budget_executed is None else f"{row.over_budget_executed:.3f}",
            f"{row.active_parameters / 1e6:.2f}M",
            f"{row.total_parameters / 1e6:.2f}M",
        ]
        for row in rows
    ]
    return _table(header, cells)


def _over_reference(row: Row) -> str:
    """Minus the reference, of the same seeds; how many those are where not all have both."""
    if (over := row.over_reference) is None:
        return ""
    return f"{over:+.4f}" + ("" if len(over.values) == len(row.seeds) else f" (seeds: {len(over.values)})")


def _cost_table(rows: Sequence[Row]) -> list[str]:
    header = [
        "system", "machine", "tokens/s", "minutes", "peak memory", "S in validation", f"S, steps > {AFTER}",
        "stage III from step", "settled at step",
    ]  # fmt: skip
    cells = []
    for row in rows:
        name, moves = row_name(row.variant, row.point), row.late_deviation != 0
        minutes = "" if row.minutes is None else f"{row.minutes:.1f}"
        minutes += "" if row.dense_minutes is None else f" ({row.dense_minutes:.1f})"
        late = "" if row.late_sparsity is None else f"{row.late_sparsity:.4f} ± {row.late_deviation:.4f}"
        cells.append(
            [
                name,
                ", ".join(str(machine + 1) for machine in row.machines),
                f"{row.tokens_per_second:,.0f}",
                minutes,
                f"{row.peak_memory_bytes / 2**30:.2f} GiB",
                f"{row.sparsity:.4f}",
                late if moves else "",
                _steps(row.sparse_steps) if moves else "",
                _steps(row.settling_steps) if moves else "",
            ]
        )
    return _table(header, cells)


def _steps(steps: Sequence[int | None]) -> str:
    return ", ".join("not" if step is None else str(step) for step in steps)


def _domain_table(rows: Sequence[Row]) -> list[str]:
    domains = list(rows[0].domains)
    cells = [[row_name(row.variant, row.point), *(f"{row.domains[domain]:.3f}" for domain in domains)] for row in rows]
    return _table(["system", *(" ".join(domain.split()).replace("|", "\\|") for domain in domains)], cells)


def _task_table(rows: Sequence[Row]) -> list[str]:
    """All tasks that any row has; the mean is over those that all have."""
    chance = {task: value for row in rows for task, value in row.chance.items()}
    common = [task for task in chance if all(task in row.zero_shot for row in rows)]
    systems = []
    for row in rows:
        found = {task: spread.values for task, spread in row.zero_shot.items()}
        seeds = len(next(iter(found.values())))
        systems.append((row_name(row.variant, row.point), str(seeds), str(row.zero_shot_rows or "all"), found))
    systems.append(("guessing", "", "", {task: [value] for task, value in chance.items()}))
    cells = []
    for *names, found in systems:
        means = map(statistics.mean, zip(*(found[task] for task in common), strict=True))
        cells.append([*names, *(_spread(found.get(task, []), ".3f") for task in chance), _spread([*means], ".3f")])
    mean = "mean" if len(common) == len(chance) else f"mean of {', '.join(common) or 'none'}"
    return _table(["system", "seeds", "rows of a task", *chance, mean], cells)


def _routing_table(records: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    header = [
        "system", "seeds", "experts under 1/8 of the wanted mean", "busiest / mean", "specialisation",
        "active experts ~ frequency", f"sparsity of {CHUNK} tokens", "reuse by the next token", "flip rate",
        "flip rate, last third", "S per layer",
    ]  # fmt: skip
    cells = []
    for name, seeds in records.items():
        figures = [record.routing.figures for record in seeds]
        flips = [rates for record in seeds if (rates := record.mean_flip_rates())]
        cells.append(
            [
                name,
                str(len(seeds)),
                _spread([one.inactive_experts for one in figures], ".0f"),
                _spread([one.over_pairs("load_imbalance") for one in figures], ".2f"),
                _spread([one.over_pairs("specialisation") for one in figures], ".4f"),
                _spread([one.frequency_correlation for one in figures], "+.2f"),
                _spread([one.mean_chunk_sparsity for one in figures], ".3f"),
                _spread([one.over_pairs("expert_reuse") for one in figures], ".3f"),
                _spread([whole for whole, _ in flips], ".5f") or NOT_MEASURED,
                _spread([late for _, late in flips], ".5f") or NOT_MEASURED,
                " ".join(_mean(layer) for layer in zip(*(one.sparsity_per_layer for one in figures), strict=True)),
            ]
        )
    return _table(header, cells)


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{Spread.of(known):{form}}" if known else ""


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
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _span(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low} to {high}"
