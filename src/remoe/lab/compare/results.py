"""The numbers of a comparison, computed from the records of its finished runs."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remoe.lab.compare.budget import matches, recomputed_flops, references
from remoe.lab.compare.experiment import Experiment, Point, RunSpec
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import ZeroShot
from remoe.lab.data import TOTAL
from remoe.lab.training.build import router_of
from remoe.routing import ROUTERS
from remoe.stages import SETTLED_WITHIN, first_sparse_step, settled_within, settling_time

AFTER = 100  # the paper gives mean and deviation of S after this many steps
MACHINE_PARTS = ("gpu", "cpu", "cores", "threads", "python", "torch", "transformers")


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        mean: of the values.
        deviation: sample standard deviation; None for one value.
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

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}}" + ("" if self.deviation is None else f" ± {self.deviation:{form.lstrip('+')}}")

    def __str__(self) -> str:
        return f"{self:.4f}"


@dataclass(frozen=True)
class Row:
    """One variant at one point of the axes, over its finished seeds.

    Attributes:
        runs: names in the pool, in the order of the seeds.
        validation_loss: nats per token, on all validation data.
        over_reference: the difference from the reference's loss with the same seed; None for the reference, or if no
            seed is shared.
        domains: the loss of each domain.
        domain_mean: the mean over domains with equal weights, so that a large domain does not dominate.
        active_parameters: weights that a validation token uses, mean over the seeds.
        flops_per_token: training FLOPs, from the pairs that were routed, dense stage included; mean over the seeds.
        over_budget: training FLOPs divided by the reference's with the same seed, mean over the seeds; None if those
            are unknown.
        over_budget_seeds: the same of each seed, if known.
        over_budget_executed: the mean including recomputation to save memory.
        tokens_per_second: median over a run's steps, then over the runs.
        minutes, dense_minutes: duration of all training steps, and of those before stage III; mean over the seeds,
            without validation, checkpoints and start-up. None if a record lacks them; dense_minutes also for a model
            without stages.
        peak_memory_bytes: maximum over the runs.
        machines: indices into `Results.machines` of the machines that trained the runs.
        sparsity: S in validation, mean over the seeds.
        sparse_steps: first step of stage III, None if it was not reached; empty unless lambda controls S.
        settling_steps: first step at which S has settled, None if it has not; empty unless lambda controls S.
        late_sparsity, late_deviation: mean and standard deviation of a step's S after the first 100 steps, mean over
            the seeds; the deviation is 0 if every token always has k experts. None for shorter runs.
        zero_shot: accuracy on each task. Runs whose tasks or number of rows differ from most are left out.
        zero_shot_rows: maximum number of rows per task; None for all.
        chance: accuracy of guessing, by task.
        causal: whether no token's loss depends on later tokens; otherwise the losses are not comparable.
    """

    variant: str
    point: dict[str, Any]
    seeds: list[int]
    runs: list[str]
    steps: list[int]
    validation_loss: Spread
    over_reference: Spread | None
    domains: dict[str, Spread]
    domain_mean: Spread
    total_parameters: int
    active_parameters: int
    tokens: float
    flops: float
    flops_per_token: float
    over_budget: float | None
    over_budget_seeds: list[float]
    over_budget_executed: float | None
    tokens_per_second: float
    minutes: float | None
    dense_minutes: float | None
    peak_memory_bytes: int
    machines: list[int]
    sparsity: float
    sparse_steps: list[int | None]
    settling_steps: list[int | None]
    late_sparsity: float | None
    late_deviation: float | None
    zero_shot: dict[str, Spread]
    zero_shot_rows: int | None
    chance: dict[str, float]
    causal: bool


@dataclass(frozen=True)
class Results:
    """Both comparisons, the machines and dates of their runs, and the runs that are missing."""

    equal_tokens: list[Row]
    equal_flops: list[Row]
    machines: list[str]
    dates: list[str]
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def results(experiment: Experiment, pool: Pool) -> Results:
    """The rows of both comparisons, from the finished runs."""
    tokens = {(run.variant, run.point, run.seed): run for run in experiment.runs}
    flops = {
        (match.tokens_run.variant, match.tokens_run.point, match.tokens_run.seed): match.run
        for match in matches(experiment, pool)
    }
    missing = {run.key: run.label for run in tokens.values() if pool.summary(run) is None}
    missing |= {
        (tokens[key].key, "flops"): f"{tokens[key].label} at equal FLOPs"
        for key, run in flops.items()
        if run != tokens[key] and (run is None or pool.summary(run) is None)
    }
    done = [run for run in [*tokens.values(), *flops.values()] if run is not None]
    machines: dict[str, int] = {}
    equal_tokens, equal_flops = (_rows(experiment, pool, runs, machines) for runs in (tokens, flops))
    if all(row.variant == experiment.reference for row in equal_flops):  # nothing to compare with
        equal_flops = []
    ended = {summary.get("machine", {}).get("date") for run in done if (summary := pool.summary(run))}
    return Results(equal_tokens, equal_flops, [*machines], sorted(ended - {None}), [*missing.values()])


Key = tuple[str, Point, int]


def _rows(experiment: Experiment, pool: Pool, runs: dict[Key, RunSpec | None], machines: dict[str, int]) -> list[Row]:
    done = {key: run for key, run in runs.items() if run is not None and pool.summary(run) is not None}
    rows = []
    for point in experiment.points:
        for variant in experiment.variants:
            if own := [run for key, run in done.items() if key[:2] == (variant, point)]:
                rows.append(_row(experiment, pool, own, machines))
    return rows


def _row(experiment: Experiment, pool: Pool, runs: Sequence[RunSpec], machines: dict[str, int]) -> Row:
    summaries = [pool.summary(run) for run in runs]
    shared = set.intersection(*(set(summary) for summary in summaries))  # old summaries may lack some
    column = {name: [summary[name] for summary in summaries] for name in shared}
    domains = [name for name in summaries[0]["validation"] if name != TOTAL]
    losses = [[summary["validation"][domain]["loss"] for domain in domains] for summary in summaries]
    over, ratios, executed = [], [], []
    for run, summary in zip(runs, summaries, strict=True):
        others = references(experiment, run)
        ended = [other for other in others if pool.summary(other) is not None]
        known = [pool.summary(other) for other in ended]
        over += [summary["validation_loss"] - o["validation_loss"] for o in known if others[0].seed == run.seed]
        ratios += [summary["flops"] / statistics.mean(other["flops"] for other in known)] if known else []
        executed += [_executed(pool, run) / statistics.mean(_executed(pool, other) for other in ended)] if ended else []
    courses = [pool.sparsities(run) for run in runs]
    late = [course[AFTER:] for course in courses if len(course) > AFTER + 1]
    targets = [summary["target_sparsity"] for summary in summaries]
    starts = [first_sparse_step(course, target) for course, target in zip(courses, targets, strict=True)]
    times = [pool.step_minutes(run) for run in runs]
    timed = None not in times
    steered = ROUTERS[summaries[0]["router"]].steered
    staged = timed and summaries[0]["target_sparsity"] > 0
    evaluated = _alike([found for run in runs if (found := pool.zero_shot(run)) is not None])
    is_reference = runs[0].variant == experiment.reference
    return Row(
        variant=runs[0].variant,
        point=dict(runs[0].point),
        seeds=[run.seed for run in runs],
        runs=[pool.name(run) for run in runs],
        steps=column["steps"],
        validation_loss=Spread.of(column["validation_loss"]),
        over_reference=Spread.of(over) if over and not is_reference else None,
        domains={domain: Spread.of(values) for domain, values in zip(domains, zip(*losses, strict=True), strict=True)},
        domain_mean=Spread.of(map(statistics.mean, losses)),
        total_parameters=column["total_parameters"][0],
        active_parameters=round(statistics.mean(column["active_parameters"])),
        tokens=statistics.mean(column["tokens"]),
        flops=statistics.mean(column["flops"]),
        flops_per_token=statistics.mean(column["flops_per_token"]),
        over_budget=statistics.mean(ratios) if ratios else None,
        over_budget_seeds=ratios,
        over_budget_executed=statistics.mean(executed) if executed else None,
        tokens_per_second=statistics.median(speed or math.nan for speed in column["tokens_per_second"]),
        minutes=statistics.mean(map(sum, times)) if timed else None,
        dense_minutes=statistics.mean(sum(t[: s - 1]) for t, s in zip(times, starts, strict=True)) if staged else None,
        peak_memory_bytes=max(column["peak_memory_bytes"]),
        machines=sorted({machines.setdefault(_machine(summary), len(machines)) for summary in summaries}),
        sparsity=statistics.mean(summary["validation"][TOTAL]["sparsity"] for summary in summaries),
        sparse_steps=[s if s <= len(c) else None for s, c in zip(starts, courses, strict=True)] if steered else [],
        settling_steps=[_settled(s, c) for s, c in zip(summaries, courses, strict=True)] if steered else [],
        late_sparsity=statistics.mean(map(statistics.mean, late)) if late else None,
        late_deviation=statistics.mean(map(statistics.stdev, late)) if late else None,
        zero_shot={task: Spread.of(values) for task, values in _tasks(evaluated, "acc").items()},
        zero_shot_rows=evaluated[0].limit if evaluated else None,
        chance={task: values[0] for task, values in _tasks(evaluated, "chance").items()},
        causal=all(router_of(run.config).causal for run in runs),
    )


def _settled(summary: dict, course: Sequence[float]) -> int | None:
    """The settling step, from 1; recomputed for many experts, because old runs used too wide a band for them."""
    target, step = summary["target_sparsity"], summary["settling_step"]
    if step is None or settled_within(target) == SETTLED_WITHIN:
        return step
    found = settling_time(course, target)
    return None if found is None else found + 1


def _executed(pool: Pool, run: RunSpec) -> float:
    """Training FLOPs including recomputation."""
    summary, sparsities = pool.summary(run), pool.layer_sparsities(run)
    return summary["flops"] + (recomputed_flops(summary, sparsities) if sparsities else 0.0)


def _alike(found: Sequence[ZeroShot]) -> list[ZeroShot]:
    """Those with the most common set of tasks and number of rows; the others are not comparable."""
    kinds = Counter((one.limit, *sorted(one.tasks)) for one in found)
    return [one for one in found if (one.limit, *sorted(one.tasks)) == kinds.most_common(1)[0][0]]


def _tasks(found: Sequence[ZeroShot], figure: str) -> dict[str, list[float]]:
    """One measure of each task."""
    return {task: [one.tasks[task][figure] for one in found] for task in found[0].tasks} if found else {}


def _machine(summary: dict) -> str:
    facts = summary.get("machine", {})
    return ", ".join(f"{name} {facts[name]}" for name in MACHINE_PARTS if name in facts) or "not recorded"
