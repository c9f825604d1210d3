"""What a comparison leaves: results.json, results.md and figures/."""

import json
import logging
import math
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from remoe.errors import CheckpointError
from remoe.lab.compare.experiment import Experiment, Run
from remoe.lab.compare.plots import draw
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import RunRecord
from remoe.lab.compare.results import results
from remoe.lab.compare.tables import markdown, row_name
from remoe.lab.data import Dataset

logger = logging.getLogger(__name__)

FIGURES = "figures"
OWN_FIGURE = re.compile(
    r"(loss-equal-(tokens|flops)|loss-against-.*|training-(loss|course|course-log)|active-against-frequency"
    r"|routed-share(-by-domain-.*)?|flips)\.(svg|png)"
)


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
    drawable: dict[str, RunRecord] = {}
    for run in experiment.runs:
        if (record := _record(run, pool, dataset, device)) is not None:
            name = row_name(run.variant, dict(run.point))
            records.setdefault(name, []).append(record)
            if run.seed == experiment.variants[run.variant].seeds[0]:
                drawable[name] = record
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
        **found.to_dict(),
        "routing": {
            name: [_routing(record) for record in seeds]
            for name, seeds in records.items()
            if seeds[0].routing is not None
        },
    }
    (out / "results.json").write_text(json.dumps(_without_nan(content), indent=2) + "\n")
    data_line = (
        f"Data: {data['training_tokens']:,} training and {data['validation_tokens']:,} validation tokens; "
        f"domains {', '.join(dataset.domains)}."
    )
    drawn = draw(experiment, found, drawable, out / FIGURES)
    _remove_others(out / FIGURES, drawn.values())
    report = out / "results.md"
    figures = {title: f"{FIGURES}/{file}" for title, file in drawn.items()}
    report.write_text(markdown(experiment, found, records, figures, data_line), encoding="utf-8")
    return report


def _remove_others(folder: Path, drawn: Collection[str]) -> None:
    """Removes the figures of a former report that this one does not have; other pictures stay."""
    for path in folder.iterdir():
        if OWN_FIGURE.fullmatch(path.name) and f"{path.stem}.png" not in drawn:
            path.unlink(missing_ok=True)  # another process may write the same report


def _record(run: Run, pool: Pool, dataset: Dataset, device: str) -> RunRecord | None:
    """A finished run's record; None where it cannot be made: its checkpoints are gone, or another process makes it."""
    if pool.summary(run) is None:
        return None
    if pool.record_file(run).exists():
        return pool.record(run, dataset, device)
    try:
        with pool.claimed(run) as lock:
            if lock is not None:
                return pool.record(run, dataset, device)
            why = "another process makes its record"
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
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
