"""What the runs of a comparison recorded while they were trained.

Legend: S records of steps, L layers, E experts.
"""

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remoe.convert.relufy.model import RelufiedMixin
from remoe.lab.analysis.measures import inactive_below
from remoe.lab.analysis.source import Source
from remoe.lab.report.contents import training_records
from remoe.lab.report.course import course_of
from remoe.lab.report.packed import exact, whole_numbers
from remoe.lab.thinning import kept_points

SHOWN = ("lm_loss", "sparsity", "lambda", "reg_loss", "penalty", "flip_rate", "grad_norm", "tokens_per_second")
FIRST_STEPS = 100  # of the dense and the sparsifying stage in the paper


@dataclass(frozen=True)
class Training:
    """The training of a model.

    Attributes:
        plots: by name, the steps (n,) and values (1, n), packed; a value that a record does not have is left out.
        target: target sparsity; None for a router that lambda does not steer.
        tokens_per_step: of the run.
        figures: numbers of the whole run, by name; None if unknown.
    """

    plots: dict[str, dict[str, Any]]
    target: float | None
    tokens_per_step: int
    figures: dict[str, float | None]


def training_of(source: Source, step: int | None) -> Training | None:
    """What a run recorded up to a step; None without a run or records."""
    if source.run is None:
        return None
    c, config, summary = source.model.config, source.run.load_config(), source.run.load_summary()
    if isinstance(source.model, RelufiedMixin):
        experts, k, steered = c.relufied["num_experts"], c.relufied["k"], True
    else:
        experts, k, steered = c.experts_per_layer, c.active_per_token, c.steered
    target = 1 - k / experts if steered else None
    found = training_from(
        training_records(source.run, step), experts, k, target,
        config.batch_size * config.seq_len,
    )  # fmt: skip
    if found is not None and summary.get("steps") == step:
        found.figures["validation_loss"] = summary["validation"]["all"]["loss"]
        if target is not None:
            found.figures["settling_step"] = summary.get("settling_step")
    return found


def training_from(
    records: Iterable[dict[str, Any]], experts: int, k: int, target: float | None, tokens_per_step: int
) -> Training | None:
    """The training of a model from its records, which are read once; the arguments are those of `course_of`."""
    watched = _Watched(experts, k)
    course = course_of(watched.through(records), experts, k, target)
    if course is None:
        return None
    plots = {name: _single(plot) for name, plot in course["plots"].items() if name in SHOWN}
    return Training(plots | watched.plots(), target, tokens_per_step, watched.figures())


def _single(plot: dict[str, Any]) -> dict[str, Any]:
    return {"step": plot["step"], "values": plot["values"]}


@dataclass
class _Watched:
    """Records on their way to another reader."""

    experts: int
    k: int
    load_steps: list[int] = field(default_factory=list)
    loads: dict[str, list[float]] = field(default_factory=lambda: {"imbalance": [], "dead": []})
    sparsity: list[float] = field(default_factory=list)  # after the first steps
    speed: list[float] = field(default_factory=list)
    flips: list[tuple[int, float]] = field(default_factory=list)
    last: int = 0

    def through(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for record in records:
            self.last = record["step"]
            load_LE = np.asarray(record.get("load_per_expert", []), np.float64)
            if load_LE.ndim == 2 and load_LE.size and load_LE.any():
                self.load_steps.append(self.last)
                # A layer counts in proportion to its pairs.
                self.loads["imbalance"].append(float(load_LE.max(axis=1).sum() / load_LE.mean(axis=1).sum()))
                self.loads["dead"].append(float((load_LE < inactive_below(self.experts, self.k)).mean()))
            if self.last > FIRST_STEPS and "sparsity" in record:
                self.sparsity.append(record["sparsity"])
            if "tokens_per_second" in record:
                self.speed.append(record["tokens_per_second"])
            if "flip_rate" in record:
                self.flips.append((self.last, record["flip_rate"]))
            yield record

    def plots(self) -> dict[str, dict[str, Any]]:
        found = {}
        for name, values in self.loads.items():
            if values:
                kept = kept_points(np.array([values]))
                found[name] = {
                    "step": whole_numbers(np.array(self.load_steps)[kept]),
                    "values": exact(np.array([values])[:, kept]),
                }
        return found

    def figures(self) -> dict[str, float | None]:
        later = [rate for step, rate in self.flips if 2 * step > self.last]
        return {
            "sparsity_mean": _of(statistics.fmean, self.sparsity),
            "sparsity_deviation": _of(statistics.pstdev, self.sparsity),
            "flip_rate": _of(statistics.fmean, later),
            "tokens_per_second": _of(statistics.median, self.speed),
        }


def _of(measure: Any, values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return measure(known) if known else None
