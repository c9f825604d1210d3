"""The files that a comparison writes: results.md, results.json, figures.md and figures/."""

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from remoe.errors import CheckpointError, DataError
from remoe.lab.analysis import figures, routing_figures
from remoe.lab.compare.budget import known_runs
from remoe.lab.compare.experiment import Experiment, RunSpec
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import DataDescription, RunRecord
from remoe.lab.compare.results import Results, Row, results
from remoe.lab.compare.tables import gallery, markdown, row_name
from remoe.lab.data import Dataset
from remoe.lab.files import atomic_write
from remoe.lab.training.build import router_of
from remoe.routing import ROUTERS

logger = logging.getLogger(__name__)

FIGURES = "figures"
OWN_FIGURE = re.compile(
    r"(loss-equal-(tokens|flops)|loss-against-.*|training-(loss|course|course-log)|active-against-frequency"
    r"|routed-share(-by-domain-.*)?|flips)\.(svg|png)"
)
LOSS_WINDOW = 50  # steps of the moving average
AHEAD = "†"


def write(
    experiment: Experiment, pool: Pool, data: DataDescription, out: Path, device: str, dataset: Dataset | None = None
) -> Path:
    """Writes all tables and figures that the finished runs allow; returns the path of results.md.

    Args:
        experiment: the experiment.
        pool: its runs.
        data: what they were trained on.
        out: the folder to write to.
        device: where the forward passes run that measure the routing of runs without a record.
        dataset: the data; without it, runs without a record have no routing in the report.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = results(experiment, pool)
    records: dict[str, list[RunRecord]] = {}
    drawable: dict[str, RunRecord] = {}
    for run in experiment.runs:
        if (record := _record(run, pool, dataset, device)) is not None:
            name = row_name(run.variant, dict(run.point))
            records.setdefault(name, []).append(record)
            if run.seed == experiment.variants[run.variant].seeds[0]:
                drawable[name] = record
    content = {
        "title": experiment.title,
        "reference": experiment.reference,
        "data": asdict(data),
        **found.to_dict(),
        "routing": {
            name: [_routing(record) for record in seeds]
            for name, seeds in records.items()
            if seeds[0].routing is not None
        },
    }
    atomic_write(out / "results.json", (json.dumps(_without_nan(content), indent=2) + "\n").encode())
    report = out / "results.md"
    atomic_write(report, markdown(experiment, found, records, data).encode())
    drawn = draw(experiment, found, drawable, out / FIGURES)
    _remove_others(out / FIGURES, drawn.values())
    pictures = {title: f"{FIGURES}/{file}" for title, file in drawn.items()}
    atomic_write(out / "figures.md", gallery(experiment, pictures).encode())
    return report


def pack_records(experiment: Experiment, pool: Pool, data: DataDescription) -> None:
    """Packs the records of an experiment's finished runs into one file, in a folder of records.

    A folder that cannot be written keeps its files, with a warning.
    """
    names = [pool.record_name(run) for run in known_runs(experiment, pool) if pool.has_record(run)]
    try:
        pool.records.pack(experiment.name, names, data)
    except (DataError, PermissionError) as error:
        logger.warning("the records of %s stay unpacked: %s", experiment.name, error)


def _remove_others(folder: Path, drawn: Collection[str]) -> None:
    """Removes figures of an earlier report that this one does not have; other pictures stay."""
    for path in folder.iterdir():
        if OWN_FIGURE.fullmatch(path.name) and f"{path.stem}.png" not in drawn:
            path.unlink(missing_ok=True)  # another process may be writing the same report


def _record(run: RunSpec, pool: Pool, dataset: Dataset | None, device: str) -> RunRecord | None:
    """A finished run's record; None if it has none and none can be made now."""
    if pool.summary(run) is None:
        return None
    if pool.has_record(run):
        return pool.record(run, dataset, device)
    try:
        if dataset is None:
            why = "it has no record, and making one needs --data or --corpus"
        else:
            with pool.claimed(run) as lock:
                if lock is not None:
                    return pool.record(run, dataset, device)
                why = "another process is making its record"
    except (CheckpointError, PermissionError) as error:
        why = str(error)
    logger.warning("no routing of %s: %s", run.label, why)
    return None


def _routing(record: RunRecord) -> dict[str, Any]:
    figures, flips = record.routing.figures, record.mean_flip_rates()
    means = {name: figures.over_pairs(name) for name in ("load_imbalance", "specialisation", "expert_reuse")}
    rates = {"flip_rate": flips[0], "flip_rate_last_third": flips[1]} if flips else {}
    return {**asdict(figures), **means, "chunk_sparsity": figures.mean_chunk_sparsity, **rates}


def _without_nan(value: Any) -> Any:
    """The same with null instead of NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(experiment: Experiment, results: Results, records: Mapping[str, RunRecord], folder: Path) -> dict[str, str]:
    """Draws all figures that the finished runs allow, as SVG and PNG.

    Args:
        experiment: the experiment.
        results: its numbers.
        records: by the system's name, the record of the run with the variant's first seed, if it is finished.
        folder: the folder to write to.

    Returns:
        The title of each figure, and the name of its PNG in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}

    def add(title: str, name: str, figure: Figure) -> None:
        figures.save(figure, folder / name)
        drawn[title] = f"{name}.png"

    look = figures.looks(experiment.variants)
    for words, name, rows in (
        ("equal tokens", "equal-tokens", results.equal_tokens),
        ("equal training FLOPs", "equal-flops", results.equal_flops),
    ):
        if len(rows) > 1 and not experiment.axes:
            losses = {row.variant: row.validation_loss.values for row in rows}
            add(
                f"Validation loss at {words}",
                f"loss-{name}",
                figures.final_losses(losses, look=look),
            )
        for axis in _numeric_axes(experiment) if rows else []:
            word = axis.rpartition(".")[2]
            systems = _by_axis(rows, axis)
            add(
                f"Validation loss against {word} at {words}",
                f"loss-against-{word}-{name}",
                figures.loss_against(systems, word, look=look if systems.keys() <= look.keys() else None),
            )

    first = {run.variant: run for run in reversed(experiment.runs) if _is_first(experiment, run)}
    first = {name: run for name, run in first.items() if _name(run) in records}
    first = {name: first[name] for name in experiment.variants if name in first}
    steps = {name: records[_name(run)].steps() for name, run in first.items()}
    if steps:
        marked = {name: name + AHEAD * router_of(first[name].config).looks_ahead for name in steps}
        courses = {marked[name]: ([r["step"] for r in rs], [r["lm_loss"] for r in rs]) for name, rs in steps.items()}
        lookahead = f" ({AHEAD}: looks at later tokens in training)" if marked.keys() != courses.keys() else ""
        add(
            f"Training loss, first seed{lookahead}",
            "training-loss",
            figures.training_losses(courses, window=LOSS_WINDOW, look={marked[name]: look[name] for name in steps}),
        )
    chosen = [name for name in experiment.figures if name in first]
    steered = {name: steps[name] for name in chosen if ROUTERS[first[name].config.router].steered}
    if steered:
        targets = {records[_name(first[name])].summary["target_sparsity"] for name in steered}
        target = targets.pop() if len(targets) == 1 else None
        for words, name, log_steps in (("", "", False), (", logarithmic steps", "-log", True)):
            add(
                f"Course of sparsity and penalty{words} (Fig. 3, 4)",
                f"training-course{name}",
                figures.training_course(steered, target, log_steps=log_steps, look=look),
            )
    _draw_routing({name: records[_name(first[name])] for name in chosen}, look, add)
    _draw_flips(experiment, records, look, add)
    return drawn


def _draw_routing(records: Mapping[str, RunRecord], look: Mapping[str, figures.Look], add: Callable) -> None:
    routings = {name: record.routing for name, record in records.items() if record.routing is not None}
    if not routings:
        return
    points = {name: (one.count_U, one.active_U) for name, one in routings.items() if one.count_U}
    if points:  # some token ids occur often enough
        add(
            "Active experts against the frequency of the token (Fig. 7)",
            "active-against-frequency",
            routing_figures.active_against_frequency(points, look=look),
        )
    shares = {name: routing.share_LE for name, routing in routings.items()}
    k = {name: record.options["k"] * record.options["granularity"] for name, record in records.items()}
    add("Share of tokens of each expert (Fig. 8)", "routed-share", routing_figures.routed_share_maps(shares, k))
    for name, routing in routings.items():
        add(
            f"{name}: share of each domain's tokens (Fig. 9, 12)",
            f"routed-share-by-domain-{name}",
            routing_figures.routed_share_by_domain(routing.share_CLE, routing.domains, k[name]),
        )


def _draw_flips(
    experiment: Experiment, records: Mapping[str, RunRecord], look: Mapping[str, figures.Look], add: Callable
) -> None:
    """Draws the flip rates at every point of the axes: the paper shows two numbers of experts."""
    runs, experts = {}, {}
    for run in experiment.runs:
        if run.variant not in experiment.figures or (name := _name(run)) not in records or name in runs:
            continue
        steps, rates = records[name].flip_rates()
        if steps:
            runs[name] = (steps, rates)
            experts[name] = run.config.experts_per_layer
    if runs:
        looks = figures.looks(runs) if experiment.axes else look  # with axes a variant has several curves
        add("Flips of the routing (Fig. 10)", "flips", routing_figures.flips(runs, experts, look=looks))


def _is_first(experiment: Experiment, run: RunSpec) -> bool:
    """Whether a run has its variant's first seed and is at the first point."""
    return run.point == experiment.points[0] and run.seed == experiment.variants[run.variant].seeds[0]


def _name(run: RunSpec) -> str:
    return row_name(run.variant, dict(run.point))


def _numeric_axes(experiment: Experiment) -> list[str]:
    """The axes that can be the x-axis of a curve."""
    numeric = []
    for axis, values in experiment.axes.items():
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numbers and len(values) > 1:
            numeric.append(axis)
    return numeric


def _by_axis(rows: list[Row], axis: str) -> dict[str, dict[float, list[float]]]:
    """Losses along an axis, for each variant and each point of the other axes."""
    systems: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        others = {name: value for name, value in row.point.items() if name != axis}
        systems.setdefault(row_name(row.variant, others), {})[row.point[axis]] = row.validation_loss.values
    return systems
