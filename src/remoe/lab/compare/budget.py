"""Equal training FLOPs: the number of steps with which a variant uses as many FLOPs as the reference."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from remoe.experts import STORED_RATIO
from remoe.lab.compare.experiment import Experiment, RunSpec, with_steps
from remoe.lab.data import TOTAL

TOLERANCE = 0.01  # a run whose FLOPs are within this share of the budget counts for both comparisons
SUFFIX = "-flops"
LATE = 0.1  # share of a run, at its end, whose cost per step predicts that of further steps


class Finished(Protocol):
    """What `Pool` knows of finished runs."""

    def summary(self, run: RunSpec) -> dict | None:
        """The run's summary; None if it is not finished."""

    def sparsities(self, run: RunSpec) -> Sequence[float]:
        """S of each step of a finished run."""


@dataclass(frozen=True)
class Match:
    """The counterpart of an equal-tokens run in the comparison at equal FLOPs.

    Attributes:
        tokens_run: the run at equal tokens.
        run: the same run, or one with other steps; None until the runs that decide this are finished.
    """

    tokens_run: RunSpec
    run: RunSpec | None


def matches(experiment: Experiment, finished: Finished) -> list[Match]:
    """The comparison at equal FLOPs, in the order of the equal-tokens runs.

    Empty if the experiment has none, or if no other variant takes part in it.
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


def known_runs(experiment: Experiment, finished: Finished) -> list[RunSpec]:
    """All runs known so far, in training order: those at equal tokens, then those at equal FLOPs."""
    runs = experiment.runs + [match.run for match in matches(experiment, finished) if match.run]
    unique: dict[str, RunSpec] = {}
    for run in runs:
        unique.setdefault(run.key, run)
    return list(unique.values())


def references(experiment: Experiment, run: RunSpec) -> list[RunSpec]:
    """The reference's run with the same seed, or all of its runs if none has that seed."""
    at_point = [
        other for other in experiment.runs if other.variant == experiment.reference and other.point == run.point
    ]
    return [other for other in at_point if other.seed == run.seed] or at_point


def _matched(run: RunSpec, others: Sequence[RunSpec], finished: Finished) -> RunSpec | None:
    summary, budgets = finished.summary(run), [finished.summary(other) for other in others]
    if summary is None or None in budgets:
        return None
    budget = statistics.mean(other["flops"] for other in budgets)
    if abs(summary["flops"] / budget - 1) <= TOLERANCE:
        return run
    steps = steps_for(budget, summary, finished.sparsities(run))
    return run if steps == run.steps else with_steps(run, steps, SUFFIX)


def steps_for(budget: float, summary: dict, sparsities: Sequence[float]) -> int:
    """The number of steps after which a run like this one has used `budget` FLOPs.

    It is not proportional: the first steps of a ReLU router cost more than later ones, and a shorter run has as many
    expensive steps.

    Args:
        budget: FLOPs.
        summary: the finished run's.
        sparsities: S of each of its steps.
    """
    tokens = summary["tokens"] / summary["steps"]
    routed = _routed_parameters(summary)
    varying = [6 * routed * (1 - s) * tokens for s in sparsities]  # 6 FLOPs per weight and token
    constant = (summary["flops"] - sum(varying)) / len(varying)
    cost = [constant + part for part in varying]
    late = cost[-max(1, round(LATE * len(cost))) :]
    spent = [0.0, *accumulate(cost)]
    if budget > spent[-1]:
        return len(cost) + round((budget - spent[-1]) / statistics.mean(late))
    return max(1, min(range(len(spent)), key=lambda steps: abs(spent[steps] - budget)))


def recomputed_flops(summary: dict, sparsities: Sequence[Sequence[float]]) -> float:
    """FLOPs of the up projections that a run recomputed, which its `flops` do not count.

    A layer keeps the pre-activations of at most STORED_RATIO times the target number of pairs, so that the dense stage
    needs no more memory than later stages. It recomputes those of further pairs in the backward pass.

    Args:
        summary: the finished run's.
        sparsities: S of each layer at each of its steps.
    """
    kept = STORED_RATIO * (1 - summary["target_sparsity"])
    again = sum(max(0.0, 1 - s - kept) for layers in sparsities for s in layers) / len(sparsities[0])
    # Two of an expert's three matrices, a multiply and an add.
    return 2 * _routed_parameters(summary) * 2 / 3 * again * summary["tokens"] / summary["steps"]


def _routed_parameters(summary: dict) -> float:
    """The number of weights in routed experts; 0 if every token uses all of them."""
    sparsity = summary["validation"][TOTAL]["sparsity"]  # the S at which active parameters were counted
    return (summary["total_parameters"] - summary["active_parameters"]) / sparsity if sparsity else 0.0
