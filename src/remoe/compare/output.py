"""What a comparison leaves: results.json, results.md and figures/."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from remoe.compare.experiment import Experiment, Run
from remoe.compare.plots import draw
from remoe.compare.pool import Pool
from remoe.compare.record import RunRecord
from remoe.compare.report import markdown, row_name
from remoe.compare.results import results
from remoe.data import Dataset
from remoe.errors import CheckpointError
from remoe.routing import ROUTERS

logger = logging.getLogger(__name__)

FIGURES = "figures"
NO_PENALTY = 1e-6  # nats, below which a penalty does nothing
MACHINE_PARTS = ("gpu", "cpu", "cores", "threads", "python", "torch", "transformers", "date")


def write(experiment: Experiment, pool: Pool, dataset: Dataset, out: Path, device: str) -> Path:
    """Writes everything that the finished runs allow; returns the path of results.md.

    Args:
        experiment: what was asked for.
        pool: its runs.
        dataset: what they were trained on.
        out: folder to write.
        device: for the forward passes that show the routing.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = results(experiment, pool)
    records: dict[str, list[RunRecord]] = {}
    for run in experiment.runs:
        if (record := _record(run, pool, dataset, device)) is not None:
            records.setdefault(row_name(run.variant, dict(run.point)), []).append(record)
    routing = {
        name: [record.routing.figures for record in seeds]
        for name, seeds in records.items()
        if seeds[0].routing is not None
    }
    first = {name: seeds[0] for name, seeds in records.items()}
    machines = _machines(experiment, pool)
    data = {
        "fingerprint": dataset.fingerprint,
        "domains": dataset.domains,
        "training_tokens": dataset.train.num_tokens,
        "validation_tokens": dataset.validation.num_tokens,
    }
    content = {
        "title": experiment.title,
        "reference": experiment.reference,
        "data": data,
        "machines": machines,
        **found.to_dict(),
        "routing": {name: [asdict(figures) for figures in seeds] for name, seeds in routing.items()},
    }
    (out / "results.json").write_text(json.dumps(_without_nan(content), indent=2) + "\n")
    data_line = (
        f"Data: {data['training_tokens']:,} training and {data['validation_tokens']:,} validation tokens; "
        f"domains {', '.join(dataset.domains)}."
    )
    shown = [row_name(variant, dict(experiment.points[0])) for variant in experiment.figures]
    top_tokens = {
        name: record.routing.top_tokens
        for name, record in first.items()
        if name in shown and record.routing is not None and record.routing.top_tokens
    }
    drawn = draw(experiment, found, first, out / FIGURES)
    report = out / "results.md"
    figures = {title: f"{FIGURES}/{file}" for title, file in drawn.items()}
    notes = [note for name, seeds in records.items() for note in _notes(name, seeds)]
    report.write_text(markdown(experiment, found, routing, top_tokens, figures, data_line, machines, notes))
    return report


def _record(run: Run, pool: Pool, dataset: Dataset, device: str) -> RunRecord | None:
    """A finished run's record; None where it cannot be made, because the run's checkpoints are gone."""
    if pool.summary(run) is None:
        return None
    try:
        return pool.record(run, dataset, device)
    except CheckpointError as error:
        logger.warning("no routing of %s: %s", run.label, error)
        return None


def _notes(name: str, seeds: Sequence[RunRecord]) -> Iterator[str]:
    for record in seeds:
        if not ROUTERS[record.summary["router"]].steered:
            continue
        penalty = record.course["lambda"][-1] * record.course["reg_loss"][-1]
        if penalty < NO_PENALTY:
            seed = record.options["seed"]
            yield f"the penalty of {name}, seed {seed}, has vanished at its end ({penalty:.1g} nats): nothing steers S."


def _machines(experiment: Experiment, pool: Pool) -> list[str]:
    """A line for each machine and set of versions that finished runs of the comparison at equal tokens name."""
    lines = {}
    for run in experiment.runs:
        if (summary := pool.summary(run)) is None:
            continue
        facts = summary.get("machine", {})
        parts = [f"{name} {facts[name]}" for name in MACHINE_PARTS if name in facts]
        lines[", ".join(parts) or "not recorded"] = None
    return [*lines]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
