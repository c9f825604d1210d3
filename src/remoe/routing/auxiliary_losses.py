"""Auxiliary losses of other routers, as pure functions with explicit normalisers; each is the loss of ONE layer.

Legend: T tokens, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.routing.regularizers import at_least_one


def switch_loss(prob_TE: Tensor, count_E: Tensor, *, k: int | Tensor, num_tokens: Tensor | int) -> Tensor:
    """Load-balance loss of the Switch Transformer (arXiv 2101.03961, Eq. 4 to 6), for k experts per token.

    Args:
        prob_TE: (T, E) router probabilities, zero for padding.
        count_E: (E,) tokens routed to each expert.
        k: experts per token.
        num_tokens: T without padding.

    Returns:
        0-dim: E * sum_e (count_e / (k T)) * (sum_t prob_te / T); 1 at perfect balance.
    """
    num_tokens = at_least_one(num_tokens)
    share_E = count_E.detach() / (k * num_tokens)
    return prob_TE.shape[1] * (share_E * prob_TE.sum(dim=0) / num_tokens).sum()


def gate_entropy(gate_TE: Tensor, *, num_tokens: Tensor | int) -> Tensor:
    """Mean entropy of a token's gates, made to sum to one (DECO, arXiv 2605.10933).

    Args:
        gate_TE: (T, E) gates, zero for padding; their absolute values count, should a learned scale turn negative.
        num_tokens: T without padding.

    Returns:
        0-dim, nats: zero where every token has at most one expert.
    """
    size_TE = gate_TE.abs()
    prob_TE = size_TE / (size_TE.sum(dim=1, keepdim=True) + 1e-5)
    # The logarithm stays finite at a closed gate: infinity times the ReLU's zero gradient would be NaN.
    nats_TE = -prob_TE * prob_TE.clamp(min=torch.finfo(prob_TE.dtype).tiny).log()
    return nats_TE.sum() / at_least_one(num_tokens)


def chunk_sparsity_loss(
    gate_TE: Tensor,
    mask_T: Tensor | None,
    *,
    seq_len: int,
    chunk: int,
    num_tokens: Tensor | int,
    document_T: Tensor | None = None,
) -> Tensor:
    """Share of the experts that a chunk of neighbouring tokens needs (BlockFFN, arXiv 2507.08771).

    With p = gate / sum of the token's gates: the mean over experts of 1 - prod over the chunk's tokens of (1 - p).

    Args:
        gate_TE: (T, E) gates, none negative, zero for padding.
        mask_T: (T,) bool, false for padding.
        seq_len: S; T is a multiple of it.
        chunk: tokens of a chunk; the last one of a sequence may be shorter.
        num_tokens: T without padding.
        document_T: (T,) int64, document of its sequence that each token is in; chunks start anew with each.

    Returns:
        0-dim, between 0 and 1: the mean over tokens of their chunk's value.
    """
    T, E = gate_TE.shape
    prob_TE = gate_TE / gate_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gate_TE.dtype).tiny)
    # A product as the exponential of a sum: p must stay short of one.
    log_TE = torch.log1p(-prob_TE.clamp(max=1 - 1e-6))
    place_T = torch.arange(T, device=gate_TE.device)
    per_sequence = -(-seq_len // chunk)
    chunk_T = place_T // seq_len * per_sequence + place_T % seq_len // chunk
    chunks = T // seq_len * per_sequence
    if document_T is not None:
        first_T = F.pad(document_T[1:] != document_T[:-1], (1, 0), value=True) | (place_T % seq_len == 0)
        within_T = place_T - place_T.where(first_T, 0).cummax(dim=0).values
        chunk_T, chunks = (within_T % chunk == 0).cumsum(dim=0) - 1, T
    untouched_CE = gate_TE.new_zeros(chunks, E).index_add(0, chunk_T, log_TE).exp()
    value_T = (1 - untouched_CE).mean(dim=1)[chunk_T]
    if mask_T is not None:
        value_T = value_T * mask_T
    return value_T.sum() / at_least_one(num_tokens)


def locality_loss(
    logits_TE: Tensor, mask_T: Tensor | None, *, seq_len: int, sharpness: float, document_T: Tensor | None = None
) -> Tensor:
    """How much neighbouring tokens differ in the experts that are on (BlockFFN, arXiv 2507.08771).

    Args:
        logits_TE: (T, E) router logits.
        mask_T: (T,) bool, false for padding.
        seq_len: S; the last token of a sequence has no next one.
        sharpness: a; sigmoid(a * logit) stands for "on".
        document_T: (T,) int64, document of its sequence that each token is in; the last of each has no next one.

    Returns:
        0-dim: mean binary cross-entropy of sigmoid(a * logits) against that of the next token.
    """
    next_TE = (logits_TE[1:] * sharpness).sigmoid()
    nats_T = F.binary_cross_entropy_with_logits(logits_TE[:-1] * sharpness, next_TE, reduction="none").mean(dim=1)
    follows_T = (torch.arange(1, max(logits_TE.shape[0], 1), device=logits_TE.device) % seq_len) != 0
    if document_T is not None:
        follows_T = follows_T & (document_T[:-1] == document_T[1:])
    if mask_T is not None:
        follows_T = follows_T & mask_T[:-1] & mask_T[1:]
    return (nats_T * follows_T).sum() / at_least_one(follows_T.sum())
