"""results.md and figures.md: the tables and figures of a comparison, as Markdown."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence

from remoe.lab.analysis.summary import CHUNK
from remoe.lab.compare.budget import TOLERANCE
from remoe.lab.compare.experiment import Experiment, describe
from remoe.lab.compare.record import DataDescription, RunRecord
from remoe.lab.compare.results import AFTER, Results, Row, Spread
from remoe.lab.text import markdown as escaped
from remoe.routing import ROUTERS
from remoe.stages import first_sparse_step

NO_PENALTY = 1e-6  # nats; a smaller penalty has no effect
IDLE_SHARE = 0.1  # a note is written if more than this share of steps have no penalty
EQUAL_TOKENS = "Equal tokens"
EQUAL_FLOPS = "Equal training FLOPs"
NOT_MEASURED = "not measured"


def markdown(
    experiment: Experiment, results: Results, records: Mapping[str, Sequence[RunRecord]], data: DataDescription
) -> str:
    """The report, without its figures.

    Args:
        experiment: the experiment.
        results: its numbers.
        records: the records of each system's runs at equal tokens, by the name of variant and point.
        data: what the runs were trained on.
    """
    lines = [f"# {experiment.title}", "", *_introduction(experiment, results, data), ""]
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
            "- `busiest / mean`: load of the busiest expert over the mean load. `specialisation`: mutual information",
            "  of expert and domain over the entropy of the domain. `reuse by the next token`: share of a token's",
            "  experts that the next token uses too. All three are means over layers, weighted by their routed pairs.",
            f"- `active experts ~ frequency`: rank correlation over token ids. `S of {CHUNK} tokens`: share of the",
            f"  experts that none of {CHUNK} neighbouring tokens uses. Both count all layers equally.",
            "- `flip rate`: share of the routing that one training step changes.",
            "",
        ]
        if any(record.mean_flip_rates() is None for seeds in routed.values() for record in seeds):
            lines += ["Flip rates are measured during training if `validate: {flips_every: N}` is set.", ""]
    for name in (name for name in routed if name in shown(experiment)):
        # Old records may lack the tokens.
        if record := next((record for record in routed[name] if record.routing.top_tokens), None):
            of = f"{name}, seed {record.options['seed']}"
            lines += [f"<details><summary>{of}: tokens with the highest share in each expert</summary>", ""]
            lines += [*_token_table(record.routing.top_tokens), "", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def gallery(experiment: Experiment, figures: Mapping[str, str]) -> str:
    """The page that shows the figures: title and path, relative to the page."""
    lines = [f"# {experiment.title}: figures", ""]
    lines += [line for title, file in figures.items() for line in (f"![{title}]({file})", "", title, "")]
    return "\n".join(lines).rstrip() + "\n"


def _introduction(experiment: Experiment, results: Results, data: DataDescription) -> list[str]:
    days = " to ".join(dict.fromkeys([results.dates[0], results.dates[-1]])) if results.dates else "dates not recorded"
    return [
        f"Data: {data.training_tokens:,} training and {data.validation_tokens:,} validation tokens; "
        f"domains {', '.join(map(escaped, data.domains))}.",
        "",
        f"Trained on ({days}):",
        "",
        *(f"{number}. {machine}" for number, machine in enumerate(results.machines, 1)),
        "",
        "- `validation loss`: nats per token, mean ± standard deviation over seeds.",
        "- `training FLOPs` count the (token, expert) pairs that were routed, from the first step on.",
        f"- `FLOPs / {experiment.reference}`: divided by the reference's.",
        f"- `executed / {experiment.reference}`: the same, including up projections recomputed to save memory.",
        f"- `S, steps > {AFTER}`: mean ± standard deviation of S over training steps.",
        "- `minutes`: duration of all training steps; in brackets, of those before stage III.",
        "- Time and memory are comparable only between runs on the same machine with nothing else running.",
    ]


def shown(experiment: Experiment) -> list[str]:
    """The names of the systems whose routing is drawn: the chosen variants at the first point."""
    return [row_name(variant, dict(experiment.points[0])) for variant in experiment.figures]


def _notes(results: Results, records: Mapping[str, Sequence[RunRecord]]) -> Iterator[str]:
    """Caveats about individual runs."""
    for row in results.equal_tokens:
        if not row.causal:
            name = row_name(row.variant, row.point)
            yield f"{name} lets tokens see later tokens even at evaluation, so its loss is not comparable."
    for row in results.equal_flops:
        if missed := [f"{ratio:.3f}" for ratio in row.over_budget_seeds if abs(ratio - 1) > TOLERANCE]:
            name = row_name(row.variant, row.point)
            yield f"{name} at equal FLOPs used {', '.join(missed)} times the budget."
    for name, seeds in records.items():
        for record in seeds:
            if ROUTERS[record.summary["router"]].steered:
                yield from _steering_notes(f"{name}, seed {record.options['seed']}", record)


def _steering_notes(name: str, record: RunRecord) -> Iterator[str]:
    course, target = record.course, record.summary["target_sparsity"]
    if target == 0:  # k = E: there is nothing to control
        return
    idle = [a * b < NO_PENALTY for a, b in zip(course["lambda"], course["reg_loss"], strict=True)]
    idle = idle[first_sparse_step(course["sparsity"], target) - 1 :]  # before that, lambda is still rising
    if not idle:
        reached = f"S is {course['sparsity'][-1]:.2f} at the end, the target {target:.3g}"
        fixed = record.options.get("sparsity.rule") == "none"
        why = "lambda is fixed" if fixed else "it has too few steps"
        yield f"{name}, never became sparse ({reached}) because {why}. Its loss says nothing about the router."
    elif (share := statistics.mean(idle[len(idle) // 2 :])) > IDLE_SHARE:
        yield (
            f"in {share:.0%} of the steps in the second half of its sparse stage, the penalty of {name}, is below "
            f"{NO_PENALTY:g} nats, so lambda does not control S there."
        )


def row_name(variant: str, point: dict) -> str:
    """`relu`, or `relu, num_experts 8`."""
    return ", ".join([variant, *([describe(tuple(point.items()))] if point else [])])


def _loss_table(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    header = [
        "system", "seeds", "steps", "validation loss", f"minus {experiment.reference}", "mean over domains",
        "FLOPs per token", "training FLOPs", f"FLOPs / {experiment.reference}", f"executed / {experiment.reference}",
        "active parameters", "total parameters",
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
    """The difference from the reference with the same seeds; with their number if that is not all seeds."""
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
    return ", ".join("never" if step is None else str(step) for step in steps)


def _domain_table(rows: Sequence[Row]) -> list[str]:
    domains = list(rows[0].domains)
    cells = [[row_name(row.variant, row.point), *(f"{row.domains[domain]:.3f}" for domain in domains)] for row in rows]
    return _table(["system", *map(escaped, domains)], cells)


def _task_table(rows: Sequence[Row]) -> list[str]:
    """All tasks of any row; the mean is over the tasks that all rows have."""
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
    return _table(["system", "seeds", "rows per task", *chance, mean], cells)


def _routing_table(records: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    header = [
        "system", "seeds", "experts below 1/8 of the target load", "busiest / mean", "specialisation",
        "active experts ~ frequency", f"S of {CHUNK} tokens", "reuse by the next token", "flip rate",
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
    """A token as inline code in a table cell; invisible characters are escaped as in Python."""
    text = repr(token)[1:-1].replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _span(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low} to {high}"
