"""Equal training FLOPs: how many steps a variant may train for what the reference spends."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from remoe.experts import STORED_RATIO
from remoe.lab.compare.experiment import Experiment, Run, with_steps
from remoe.lab.data import TOTAL

TOLERANCE = 0.01  # a run whose FLOPs are this close to the budget counts for both comparisons
SUFFIX = "-flops"
LATE = 0.1  # the last part of a run, whose cost per step more steps would have


class Finished(Protocol):
    """Knows finished runs, as `Pool` does."""

    def summary(self, run: Run) -> dict | None:
        """Its figures; None for a run that is not finished."""

    def sparsities(self, run: Run) -> Sequence[float]:
        """S of each step of a finished run."""


@dataclass(frozen=True)
class Match:
    """What stands for an equal-tokens run in the comparison at equal FLOPs.

    Attributes:
        tokens_run: the run at equal tokens.
        run: itself, one with other steps, or None while a summary is missing that decides this.
    """

    tokens_run: Run
    run: Run | None


def matches(experiment: Experiment, finished: Finished) -> list[Match]:
    """The comparison at equal FLOPs, in the order of the equal-tokens runs; empty when the experiment has none.

    So it is too where the reference has nothing to be compared with.
    """
    others = [variant for name, variant in experiment.variants.items() if name != experiment.reference]
    if not experiment.equal_flops or not any(variant.equal_flops for variant in others):
        return []
    found = []
    for run in experiment.runs:
        if run.variant == experiment.reference:
            found.append(Match(run, run))
        elif experiment.variants[run.variant].equal_flops:
            found.append(Match(run, _matched(run, references(experiment, run), finished)))
    return found


def references(experiment: Experiment, run: Run) -> list[Run]:
    """The reference's run with the same seed, or all of its seeds where there is none."""
    at_point = [
        other for other in experiment.runs if other.variant == experiment.reference and other.point == run.point
    ]
    return [other for other in at_point if other.seed == run.seed] or at_point


def _matched(run: Run, others: Sequence[Run], finished: Finished) -> Run | None:
    summary, budgets = finished.summary(run), [finished.summary(other) for other in others]
    if summary is None or None in budgets:
        return None
    budget = statistics.mean(other["flops"] for other in budgets)
    if abs(summary["flops"] / budget - 1) <= TOLERANCE:
        return run
    steps = steps_for(budget, summary, finished.sparsities(run))
    return run if steps == run.steps else with_steps(run, steps, SUFFIX)


def steps_for(budget: float, summary: dict, sparsities: Sequence[float]) -> int:
    """Steps after which a run like this one has spent `budget` FLOPs.

    Not in proportion: the first steps of a ReLU router cost more than the others, and a shorter run has as many of
    them.

    Args:
        budget: FLOPs.
        summary: of the finished run.
        sparsities: S of each of its steps.
    """
    tokens = summary["tokens"] / summary["steps"]
    routed = _routed_parameters(summary)
    varying = [6 * routed * (1 - s) * tokens for s in sparsities]  # FLOPs of a weight for each token that meets it
    constant = (summary["flops"] - sum(varying)) / len(varying)
    cost = [constant + part for part in varying]
    late = cost[-max(1, round(LATE * len(cost))) :]
    spent = [0.0, *accumulate(cost)]
    if budget > spent[-1]:
        return len(cost) + round((budget - spent[-1]) / statistics.mean(late))
    return max(1, min(range(len(spent)), key=lambda steps: abs(spent[steps] - budget)))


def recomputed_flops(summary: dict, sparsities: Sequence[Sequence[float]]) -> float:
    """FLOPs of the up projections that a run computed twice, which its `flops` do not count.

    A layer keeps the pre-activations of at most STORED_RATIO times the wanted pairs, so that the dense stage takes no
    more memory than the others; those of further pairs are computed again in the backward pass.

    Args:
        summary: of the finished run.
        sparsities: S of each layer at each of its steps.
    """
    kept = STORED_RATIO * (1 - summary["target_sparsity"])
    again = sum(max(0.0, 1 - s - kept) for layers in sparsities for s in layers) / len(sparsities[0])
    # Two of an expert's three matrices, a multiply and an add.
    return 2 * _routed_parameters(summary) * 2 / 3 * again * summary["tokens"] / summary["steps"]


def _routed_parameters(summary: dict) -> float:
    """Weights of all experts; 0 where every token has all of them."""
    sparsity = summary["validation"][TOTAL]["sparsity"]  # at which active parameters were counted
    return (summary["total_parameters"] - summary["active_parameters"]) / sparsity if sparsity else 0.0
