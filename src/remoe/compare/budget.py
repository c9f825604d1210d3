"""Equal training FLOPs: how many steps a variant may train for what the reference spends."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from remoe.compare.experiment import Experiment, Run, with_steps

TOLERANCE = 0.01  # a run whose FLOPs are this close to the budget counts for both comparisons
SUFFIX = "-flops"

SummaryOf = Callable[[Run], dict | None]  # a finished run's summary


@dataclass(frozen=True)
class Match:
    """What stands for an equal-tokens run in the comparison at equal FLOPs.

    Attributes:
        tokens_run: the run at equal tokens.
        run: itself, one with other steps, or None while a summary is missing that decides this.
    """

    tokens_run: Run
    run: Run | None


def matches(experiment: Experiment, summary_of: SummaryOf) -> list[Match]:
    """The comparison at equal FLOPs, in the order of the equal-tokens runs; empty when the experiment has none."""
    if not experiment.equal_flops:
        return []
    runs = experiment.runs
    found = []
    for run in runs:
        if run.variant == experiment.reference:
            found.append(Match(run, run))
        elif experiment.variants[run.variant].equal_flops:
            references = [r for r in runs if r.variant == experiment.reference and r.point == run.point]
            found.append(Match(run, _matched(run, references, summary_of)))
    return found


def _matched(run: Run, references: list[Run], summary_of: SummaryOf) -> Run | None:
    # without a reference of its own seed: the mean over the reference's seeds
    same_seed = [reference for reference in references if reference.seed == run.seed] or references
    budgets = [_flops(reference, summary_of) for reference in same_seed]
    flops = _flops(run, summary_of)
    if flops is None or None in budgets:
        return None
    budget = statistics.mean(budgets)
    if abs(flops / budget - 1) <= TOLERANCE:
        return run
    steps = max(1, round(run.steps * budget / flops))
    return run if steps == run.steps else with_steps(run, steps, SUFFIX)


def _flops(run: Run, summary_of: SummaryOf) -> float | None:
    summary = summary_of(run)
    return None if summary is None else summary.get("flops")
