"""The paper's penalty on the gates (arXiv 2412.14711, Eq. 9 to 11) and its opposites, which open experts.

These are pure functions with explicit normalisers. Each is of ONE layer; `SparsityController.loss_terms` takes the mean
over layers, the 1/L of the equations.

Legend: T tokens, E experts.
"""

from torch import Tensor
from torch.nn import functional as F


def l1_loss(gate_TE: Tensor, *, num_tokens: Tensor | int) -> Tensor:
    """Plain L1 penalty, 0-dim, of (T, E) gates that are zero for padding; `num_tokens` is T without it."""
    return gate_TE.abs().sum() / at_least_one(num_tokens)  # Eq. 9: 1/T sum_t sum_e |R(x_t)_e|


def relative_load(count_E: Tensor, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """f_e, (E,), without gradient: 1 for every expert at balance and target sparsity."""
    E = count_E.shape[0]
    return count_E.detach() * (E / k) / at_least_one(num_tokens)  # Eq. 11: f_e = E/(k T) sum_t 1{R_e > 0}


def load_balanced_l1_loss(
    gate_TE: Tensor, count_E: Tensor, *, k: int, num_tokens: Tensor | int, power: float = 1.0
) -> Tensor:
    """L1 penalty weighted by each expert's load, 0-dim.

    Because f is taken over the tokens given here, the loss of a batch is the mean of its micro-batches' losses only
    if their loads agree.

    Args:
        gate_TE: (T, E) gates, zero for padding.
        count_E: (E,) tokens routed to each expert.
        k: target experts per token, a mean.
        num_tokens: T without padding.
        power: p; each f_e is raised to it. 1 in the paper.
    """
    f_E = relative_load(count_E, k=k, num_tokens=num_tokens)
    if power != 1:
        f_E = f_E**power
    return (gate_TE.abs().sum(dim=0) * f_E).sum() / at_least_one(num_tokens)  # Eq. 10: 1/T sum_t sum_e f_e R(x_t)_e


def closed_distance(logits_TE: Tensor, *, num_tokens: Tensor | int) -> Tensor:
    """How far each expert's closed pairs are from opening, (E,): 1/T sum_t max(0, -logit), logits zero for padding."""
    return F.relu(-logits_TE).sum(dim=0) / at_least_one(num_tokens)


def closed_loss(distance_E: Tensor, count_E: Tensor, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """What opens experts, 0-dim: the opposite of the load-balanced L1 penalty, ours.

    sum_e max(0, 2 - f_e) distance_e, whose weight is 1 at balance: experts without tokens open first, and those with
    twice their share do not.

    Args:
        distance_E: (E,) `closed_distance`.
        count_E: (E,) tokens routed to each expert.
        k: target experts per token, a mean.
        num_tokens: those that `count_E` counts.
    """
    return (distance_E * (2 - relative_load(count_E, k=k, num_tokens=num_tokens)).clamp(min=0)).sum()


def starved_loss(distance_E: Tensor, count_E: Tensor, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """What lifts experts with less than a quarter of their share, 0-dim, ours: the sum of their distances.

    The share is k T/E tokens. Ten tokens more than were counted must lie below its quarter, because in small batches an
    expert can have none by chance. So none is starved where the share is 40 tokens or less.

    Args:
        distance_E, count_E, k, num_tokens: as `closed_loss`.
    """
    E = count_E.shape[0]
    return (distance_E * (4 * E * (count_E + 10) < k * num_tokens)).sum()  # integers, the same on any number of ranks


def at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    """A batch of padding only has no tokens: its sums are zero and must stay so."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
