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


def closed_loss(logits_TE: Tensor, count_E: Tensor | None, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """How far closed pairs are from opening, 0-dim: the opposite of the L1 penalty, ours.

    1/T sum_t sum_e w_e max(0, -logit). With loads, w_e = max(0, 2 - f_e), which is 1 at balance: experts without tokens
    open first, and those with twice their share do not. Otherwise w_e = 1.

    Args:
        logits_TE: (T, E), zero for padding.
        count_E: (E,) tokens routed to each expert, or None.
        k, num_tokens: as `load_balanced_l1_loss`.
    """
    closed_E = F.relu(-logits_TE).sum(dim=0)
    if count_E is not None:
        closed_E = closed_E * (2 - relative_load(count_E, k=k, num_tokens=num_tokens)).clamp(min=0)
    return closed_E.sum() / at_least_one(num_tokens)


def starved_loss(logits_TE: Tensor, count_E: Tensor, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """How far the closed pairs of experts with less than a quarter of their share are from opening, 0-dim, ours.

    1/T sum_t sum_e [f_e + 3 E/(k T) < 1/4] max(0, -logit). Three tokens more than were counted: an expert that gets
    three per batch in the mean gets none in one batch of 20 (Poisson), so that in small batches few are taken for
    starved, and none if k T/E, their share, is 12 tokens or less.

    Args:
        logits_TE: (T, E), zero for padding.
        count_E, k, num_tokens: as `load_balanced_l1_loss`.
    """
    starved_E = relative_load(count_E + 3, k=k, num_tokens=num_tokens) < 0.25
    return (F.relu(-logits_TE).sum(dim=0) * starved_E).sum() / at_least_one(num_tokens)


def at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    """A batch of padding only has no tokens: its sums are zero and must stay so."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
