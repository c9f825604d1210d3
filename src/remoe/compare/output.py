"""What a comparison leaves: results.json, results.md and figures/."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from remoe.compare.experiment import Experiment
from remoe.compare.plots import draw
from remoe.compare.pool import Pool
from remoe.compare.report import markdown, row_name
from remoe.compare.results import results
from remoe.data import Dataset

FIGURES = "figures"
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
    records = {
        row_name(run.variant, dict(run.point)): pool.record(run, dataset, device)
        for run in experiment.runs
        if run.seed == experiment.variants[run.variant].seeds[0] and pool.summary(run) is not None
    }
    routing = {name: record.routing.figures for name, record in records.items() if record.routing is not None}
    drawn = draw(experiment, found, records, out / FIGURES)
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
        "routing": {name: asdict(figures) for name, figures in routing.items()},
    }
    (out / "results.json").write_text(json.dumps(_without_nan(content), indent=2) + "\n")
    data_line = (
        f"Data: {data['training_tokens']:,} training and {data['validation_tokens']:,} validation tokens; "
        f"domains {', '.join(dataset.domains)}."
    )
    report = out / "results.md"
    figures = {title: f"{FIGURES}/{file}" for title, file in drawn.items()}
    report.write_text(markdown(experiment, found, routing, figures, data_line, machines))
    return report


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
