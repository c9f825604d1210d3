"""Auxiliary losses of routers, as pure functions with explicit normalisers.

Each is the loss of ONE layer. How layers are combined (mean in the paper, sum in the official code) is decided by
the model: see `RemoeConfig.regularizer_normalization`.

Legend: T tokens, E experts.
"""

from torch import Tensor


def l1_loss(gate_TE: Tensor, *, num_tokens: Tensor | int) -> Tensor:
    """Plain L1 penalty on the gates (arXiv 2412.14711, Eq. 9, for one layer).

    Args:
        gate_TE: (T, E) gates, zero for padding.
        num_tokens: T without padding, the normaliser.

    Returns:
        0-dim: sum |gate| / num_tokens.
    """
    return gate_TE.abs().sum() / _at_least_one(num_tokens)


def load_balanced_l1_loss(gate_TE: Tensor, count_E: Tensor, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """L1 penalty weighted by each expert's load (arXiv 2412.14711, Eq. 10 and 11, for one layer).

    f_e = E / (k T) * count_e has no gradient; it is 1 for every expert at balance and target sparsity. Because f is
    taken over the tokens given here, the loss of a batch is not the mean of its micro-batches' losses: that holds
    only where their loads agree.

    Args:
        gate_TE: (T, E) gates, zero for padding.
        count_E: (E,) tokens routed to each expert.
        k: wanted mean of active experts per token.
        num_tokens: T without padding.

    Returns:
        0-dim: sum_t sum_e f_e |gate_te| / num_tokens.
    """
    num_tokens = _at_least_one(num_tokens)
    load_E = count_E.detach() * (gate_TE.shape[1] / k) / num_tokens
    return (gate_TE.abs().sum(dim=0) * load_E).sum() / num_tokens


def switch_loss(prob_TE: Tensor, count_E: Tensor, *, k: int, num_tokens: Tensor | int) -> Tensor:
    """Load-balance loss of the Switch Transformer (arXiv 2101.03961, Eq. 4 to 6), for k experts per token.

    Args:
        prob_TE: (T, E) router probabilities, zero for padding.
        count_E: (E,) tokens routed to each expert.
        k: experts per token.
        num_tokens: T without padding.

    Returns:
        0-dim: E * sum_e (count_e / (k T)) * (sum_t prob_te / T); 1 at perfect balance.
    """
    num_tokens = _at_least_one(num_tokens)
    share_E = count_E.detach() / (k * num_tokens)
    return prob_TE.shape[1] * (share_E * prob_TE.sum(dim=0) / num_tokens).sum()


def _at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    """A batch of padding only has no tokens: its sums are zero and must stay so."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
