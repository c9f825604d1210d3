"""The numbers of a comparison, from the summaries of its finished runs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remoe.compare.budget import matches
from remoe.compare.experiment import Experiment, Point, Run
from remoe.compare.pool import Pool
from remoe.data import TOTAL


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        mean: of the values.
        deviation: standard deviation of a sample; None for one value.
        values: in the order of the seeds.
    """

    mean: float
    deviation: float | None
    values: list[float]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value."""
        values = list(values)
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, values)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


@dataclass(frozen=True)
class Row:
    """One variant at one point of the axes, over its finished seeds.

    Attributes:
        runs: folders in the pool, in the order of the seeds.
        validation_loss: nats per token, on all of the validation data.
        over_reference: the same minus the reference's of the same seed; None for the reference, or where no seed is
            shared.
        domains: the loss of each domain.
        active_parameters: weights that a validation token meets, mean over the seeds.
        flops_per_token: of training, from the pairs really routed, dense stage included; mean over the seeds.
        tokens_per_second: median over a run's steps, then over the runs.
        peak_memory_bytes: the largest of the runs.
        sparsity: of validation, mean over the seeds.
        settling_steps: first step at which S has settled, None where it has not.
        sparsity_deviation: standard deviation of a step's S from then on, mean over the seeds that settled.
    """

    variant: str
    point: dict[str, Any]
    seeds: list[int]
    runs: list[str]
    steps: list[int]
    validation_loss: Spread
    over_reference: Spread | None
    domains: dict[str, Spread]
    total_parameters: int
    active_parameters: int
    tokens: float
    flops: float
    flops_per_token: float
    tokens_per_second: float
    peak_memory_bytes: int
    sparsity: float
    settling_steps: list[int | None]
    sparsity_deviation: float | None


@dataclass(frozen=True)
class Results:
    """Both comparisons, and what is missing from them."""

    equal_tokens: list[Row]
    equal_flops: list[Row]
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def results(experiment: Experiment, pool: Pool) -> Results:
    """The rows of both comparisons from what is finished."""
    tokens = {(run.variant, run.point, run.seed): run for run in experiment.runs}
    flops = {
        (match.tokens_run.variant, match.tokens_run.point, match.tokens_run.seed): match.run
        for match in matches(experiment, pool.summary)
    }
    missing = [run.label for run in tokens.values() if pool.summary(run) is None]
    missing += [
        f"{tokens[key].label} at equal FLOPs"
        for key, run in flops.items()
        if run != tokens[key] and (run is None or pool.summary(run) is None)
    ]
    return Results(_rows(experiment, pool, tokens), _rows(experiment, pool, flops), missing)


Key = tuple[str, Point, int]


def _rows(experiment: Experiment, pool: Pool, runs: dict[Key, Run | None]) -> list[Row]:
    done = {key: run for key, run in runs.items() if run is not None and pool.summary(run) is not None}
    losses = {key: pool.summary(run)["validation_loss"] for key, run in done.items()}
    rows = []
    for point in experiment.points:
        for variant in experiment.variants:
            own = [key for key in done if key[:2] == (variant, point)]
            if own:
                shared = {key: (experiment.reference, point, key[2]) for key in own}
                over = [losses[key] - losses[other] for key, other in shared.items() if other in losses]
                rows.append(_row(pool, [done[key] for key in own], None if variant == experiment.reference else over))
    return rows


def _row(pool: Pool, runs: Sequence[Run], over_reference: list[float] | None) -> Row:
    summaries = [pool.summary(run) for run in runs]
    column = {name: [summary[name] for summary in summaries] for name in summaries[0]}
    domains = [name for name in summaries[0]["validation"] if name != TOTAL]
    settled = (summary for summary in summaries if summary["settling_step"] is not None)
    deviations = [summary["sparsity_deviation"] for summary in settled]
    return Row(
        variant=runs[0].variant,
        point=dict(runs[0].point),
        seeds=[run.seed for run in runs],
        runs=[pool.name(run) for run in runs],
        steps=column["steps"],
        validation_loss=Spread.of(column["validation_loss"]),
        over_reference=Spread.of(over_reference) if over_reference else None,
        domains={
            domain: Spread.of(summary["validation"][domain]["loss"] for summary in summaries) for domain in domains
        },
        total_parameters=column["total_parameters"][0],
        active_parameters=round(statistics.mean(column["active_parameters"])),
        tokens=statistics.mean(column["tokens"]),
        flops=statistics.mean(column["flops"]),
        flops_per_token=statistics.mean(column["flops_per_token"]),
        tokens_per_second=statistics.median(speed or math.nan for speed in column["tokens_per_second"]),
        peak_memory_bytes=max(column["peak_memory_bytes"]),
        sparsity=statistics.mean(summary["validation"][TOTAL]["sparsity"] for summary in summaries),
        settling_steps=column["settling_step"],
        sparsity_deviation=statistics.mean(deviations) if deviations else None,
    )
