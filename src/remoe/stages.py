"""The three stages of training, and when sparsity has settled (arXiv 2412.14711, section 3.4). No torch import."""

from collections.abc import Sequence

DENSE_ABOVE = 0.45
SPARSE_BELOW = 1.5
SPARSE_STEPS = 10
SETTLED_STEPS, SETTLED_WITHIN, SETTLED_OF_DENSITY = 50, 0.01, 0.08


def stage(sparsity: float, target: float) -> str:
    """The stage of training (arXiv 2412.14711, section 3.4) that a sparsity S belongs to.

    "dense" while more than 45 % of the pairs are active (random weights activate a half), "sparse" once they are
    at most 1.5 times the target number, "sparsifying" in between.
    """
    density = 1 - sparsity
    if target == 0:
        return "dense"
    if density <= SPARSE_BELOW * (1 - target):
        return "sparse"
    return "dense" if density >= DENSE_ABOVE else "sparsifying"


def settled_within(target: float) -> float:
    """How far S may be from its target to count as settled.

    0.01, or 8 % of the target density if that is less, as it is for k = 1 from E = 16 on. Otherwise a model with
    E = 128 and all experts closed would count as near its target.
    """
    return SETTLED_WITHIN if SETTLED_OF_DENSITY * (1 - target) >= SETTLED_WITHIN else SETTLED_OF_DENSITY * (1 - target)


def settling_time(sparsities: Sequence[float], target: float) -> int | None:
    """Stages I and II in steps: the first index from which S stays near its target for SETTLED_STEPS steps.

    Args:
        sparsities: S of each step, from the first.
        target: 1 - k/E.

    Returns:
        Index (steps before it are stages I and II), or None when S never settles.
    """
    within, tolerance = 0, settled_within(target)
    for index, sparsity in enumerate(sparsities):
        within = within + 1 if abs(sparsity - target) <= tolerance else 0
        if within == SETTLED_STEPS:
            return index - SETTLED_STEPS + 1
    return None


def first_sparse_step(sparsities: Sequence[float], target: float) -> int:
    """The step, from 1, at which stage III begins; one behind the last where it never does.

    That is where S is in it for SPARSE_STEPS steps, or to the end: before, it may just pass through, when the penalty
    has closed too much and the experts open again.
    """
    in_a_row = 0
    for step, sparsity in enumerate(sparsities, 1):
        in_a_row = in_a_row + 1 if stage(sparsity, target) == "sparse" else 0
        if in_a_row == SPARSE_STEPS:
            return step - SPARSE_STEPS + 1
    return len(sparsities) - in_a_row + 1
