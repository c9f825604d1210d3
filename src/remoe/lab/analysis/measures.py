"""Measures of routing, each a pure function of which experts were active.

What they reproduce, from ReMoE (arXiv 2412.14711) unless BlockFFN (arXiv 2507.08771) is named:

    flip_rate                              Fig. 10
    active_by_token                        Fig. 7
    routed_share, inactive_experts         Fig. 8
    routed_share_by_domain                 Fig. 9 and 12
    top_tokens                             Table 12
    sparsity_per_layer                     Eq. 8; BlockFFN's token-level sparsity
    chunk_sparsity                         BlockFFN's chunk-level sparsity
    expert_reuse                           BlockFFN's reuse ratio
    load_imbalance, specialisation,
    rank_correlation                       in neither paper

Masks `mask_T` are false for padding, which is then ignored. A result without anything to count, such as that of a
layer without routed pairs or a domain without tokens, is NaN.

Legend: L layers, T tokens, E experts, C domains, U distinct token ids, N chunks of tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.errors import ConfigError

# An expert with less than this share of the target load, k/E of the tokens, is inactive. For E = 8 and k = 1 that is
# the paper's 1/64 of the tokens (Fig. 8).
INACTIVE_LOAD = 1 / 8


@dataclass(frozen=True)
class TokenActivity:
    """Active experts of each distinct token id.

    Attributes:
        token_U: (U,) int64, token ids, ascending.
        count_U: (U,) int64, how often the id occurs.
        active_U: (U,) float64, mean active experts per layer over its occurrences.
    """

    token_U: Tensor
    count_U: Tensor
    active_U: Tensor

    @property
    def frequency_correlation(self) -> float:
        """Spearman correlation of active experts and frequency; negative if rare tokens get more experts (Fig. 7)."""
        return rank_correlation(self.active_U, self.count_U)


@dataclass(frozen=True)
class Specialisation:
    """How much the expert of a routed pair reveals about its domain.

    Attributes:
        nats_L: (L,) float64, mutual information of expert and domain, in nats.
        normalised_L: (L,) float64, the same divided by the entropy of the domain: 0 if experts ignore the domain, 1 if
            the expert determines it. NaN if all pairs are of one domain.
    """

    nats_L: Tensor
    normalised_L: Tensor


class TopToken(NamedTuple):
    """A token id that an expert takes, with P(expert active | id) and the number of occurrences of the id."""

    token: int
    probability: float
    count: int


def flip_rate(before_LTE: Tensor, after_LTE: Tensor, mask_T: Tensor | None = None) -> float:
    """Flip rate: share of (layer, token, expert) triples that changed between two states of a model (Fig. 10).

    Args:
        before_LTE: (L, T, E) bool, active pairs of the earlier state.
        after_LTE: (L, T, E) bool, active pairs of the later state on the same tokens.
        mask_T: (T,) bool, tokens to count; all by default.

    Returns:
        sum_l |M_i - M_{i-1}|_1 / (L T E), in 0..1.
    """
    changed_LTE = _keep(before_LTE ^ after_LTE, mask_T)
    return _ratio(changed_LTE.sum(), changed_LTE.numel())


def active_by_token(
    active_LTE: Tensor, token_T: Tensor, *, min_count: int = 1, mask_T: Tensor | None = None
) -> TokenActivity:
    """Active experts of each token id, and how often the id occurs (Fig. 7).

    Args:
        active_LTE: (L, T, E) bool.
        token_T: (T,) int64, token ids.
        min_count: ids with fewer occurrences are left out, because their means are noisy.
        mask_T: (T,) bool, tokens to count; all by default.
    """
    active_LTE, token_T = _keep(active_LTE, mask_T), token_T if mask_T is None else token_T[mask_T]
    token_U, index_T, count_U = token_T.unique(return_inverse=True, return_counts=True)
    pairs_U = torch.zeros_like(count_U).index_add_(0, index_T, active_LTE.sum(dim=(0, 2)))
    active_U = pairs_U.double() / (count_U * active_LTE.shape[0])
    frequent_U = count_U >= min_count
    return TokenActivity(token_U[frequent_U], count_U[frequent_U], active_U[frequent_U])


def rank_correlation(x_N: Tensor, y_N: Tensor) -> float:
    """Spearman's rank correlation of two (N,) tensors, in -1..1; equal values share the mean of their ranks.

    NaN if one of them is constant, which includes tensors of fewer than two values.
    """
    x_N, y_N = _ranks(x_N), _ranks(y_N)
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return ((x_N @ y_N) / (x_N.square().sum() * y_N.square().sum()).sqrt()).item()


def routed_share(active_LTE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Share of the tokens that each expert of each layer takes (Fig. 8).

    Args:
        active_LTE: (L, T, E) bool.
        mask_T: (T,) bool, tokens to count; all by default.

    Returns:
        (L, E) float64, in 0..1. Its sum over experts is the mean number of active experts per layer.
    """
    active_LTE = _keep(active_LTE, mask_T)
    return active_LTE.sum(dim=1).double() / active_LTE.shape[1]


def routed_share_by_domain(
    active_LTE: Tensor, domain_T: Tensor, num_domains: int, mask_T: Tensor | None = None
) -> Tensor:
    """Share of each domain's tokens that each expert of each layer takes (Fig. 9, 12).

    Args:
        active_LTE: (L, T, E) bool.
        domain_T: (T,) int64, domain of each token, below `num_domains`.
        num_domains: C.
        mask_T: (T,) bool, tokens to count; all by default.

    Returns:
        (C, L, E) float64, in 0..1. Its sum over experts is the mean number of active experts per domain and layer.
    """
    keep_T = torch.ones_like(domain_T, dtype=torch.bool) if mask_T is None else mask_T
    return torch.stack([routed_share(active_LTE, keep_T & (domain_T == domain)) for domain in range(num_domains)])


def inactive_below(num_experts: int, k: float) -> float:
    """The share of the tokens below which an expert counts as inactive: k / (8 E), which is 1/64 in Fig. 8."""
    return INACTIVE_LOAD * k / num_experts


def inactive_experts(share_LE: Tensor, k: float) -> Tensor:
    """Experts with less than an eighth of the target load, marked in Fig. 8: shares (..., E) to bool (..., E)."""
    return share_LE < inactive_below(share_LE.shape[-1], k)


def sparsity_per_layer(active_LTE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Sparsity S of each layer (Eq. 8), which is BlockFFN's token-level sparsity (TLS) of the layer.

    Args:
        active_LTE: (L, T, E) bool.
        mask_T: (T,) bool, tokens to count; all by default.

    Returns:
        (L,) float64, in 0..1: the share of (token, expert) pairs that are not active.
    """
    return 1 - routed_share(active_LTE, mask_T).mean(dim=1)


def load_imbalance(active_LTE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Load of the busiest expert divided by the mean load, per layer.

    Args:
        active_LTE: (L, T, E) bool.
        mask_T: (T,) bool, tokens to count; all by default.

    Returns:
        (L,) float64, from 1 (even) to E (one expert takes everything).
    """
    return imbalance_of(_keep(active_LTE, mask_T).sum(dim=1))


def imbalance_of(count_LE: Tensor) -> Tensor:
    """`load_imbalance` from the number of tokens of each expert, (L, E) int64."""
    return count_LE.double().amax(dim=1) / count_LE.double().mean(dim=1)


def specialisation(
    active_LTE: Tensor, domain_T: Tensor, num_domains: int, mask_T: Tensor | None = None
) -> Specialisation:
    """Mutual information of expert and domain over the routed pairs of each layer.

    The joint distribution is that of a pair drawn uniformly from the layer's pairs. Estimates from few pairs are too
    high, by about (C - 1)(E - 1) / (2 pairs) for independent tokens and by more for tokens of few documents, so that
    a layer with few active pairs appears specialised. A mean over layers must therefore weight them by their pairs.

    Args:
        active_LTE: (L, T, E) bool.
        domain_T: (T,) int64, domain of each token, below `num_domains`.
        num_domains: C.
        mask_T: (T,) bool, tokens to count; all by default.
    """
    return specialisation_of(pairs_by_domain(active_LTE, domain_T, num_domains, mask_T))


def pairs_by_domain(active_LTE: Tensor, domain_T: Tensor, num_domains: int, mask_T: Tensor | None = None) -> Tensor:
    """(L, C, E) int64: the routed pairs of each domain; arguments as in `specialisation`."""
    keep_T = torch.ones_like(domain_T, dtype=torch.bool) if mask_T is None else mask_T
    of_domain = [active_LTE[:, keep_T & (domain_T == domain)].sum(dim=1) for domain in range(num_domains)]
    return torch.stack(of_domain, dim=1)


def specialisation_of(pairs_LCE: Tensor) -> Specialisation:
    """`specialisation` from the number of pairs of each domain, (L, C, E) int64."""
    pairs_LCE = pairs_LCE.double()
    joint_LCE = pairs_LCE / pairs_LCE.sum(dim=(1, 2), keepdim=True)
    domain_entropy_L = _entropy(joint_LCE.sum(dim=2))
    # I = H(domain) + H(expert) - H(both), clamped because rounding could make it negative.
    nats_L = domain_entropy_L + _entropy(joint_LCE.sum(dim=1)) - _entropy(joint_LCE.flatten(1))
    nats_L = nats_L.clamp(min=0).minimum(domain_entropy_L)
    several_L = (pairs_LCE.sum(dim=2) > 0).sum(dim=1) > 1
    return Specialisation(nats_L, torch.where(several_L, nats_L / domain_entropy_L, torch.nan))


def top_tokens(
    active_TE: Tensor, token_T: Tensor, limit: int, *, min_count: int = 1, mask_T: Tensor | None = None
) -> list[list[TopToken]]:
    """The token ids that are most likely to activate each expert of one layer (Table 12).

    Args:
        active_TE: (T, E) bool, active pairs of the layer.
        token_T: (T,) int64, token ids.
        limit: maximum number of ids per expert.
        min_count: ids with fewer occurrences are left out.
        mask_T: (T,) bool, tokens to count; all by default.

    Returns:
        For each expert, the ids that it takes at least once, by decreasing P(expert active | id), then decreasing
        count, then increasing id.
    """
    if mask_T is not None:
        active_TE, token_T = active_TE[mask_T], token_T[mask_T]
    token_U, index_T, count_U = token_T.unique(return_inverse=True, return_counts=True)
    # int32 is enough for any count, and needs half as much memory as int64.
    taken_UE = torch.zeros(len(token_U), active_TE.shape[1], dtype=torch.int32, device=active_TE.device)
    taken_UE.index_add_(0, index_T, active_TE.int())
    return top_tokens_of(token_U, count_U, taken_UE, limit, min_count=min_count)


def top_tokens_of(
    token_U: Tensor, count_U: Tensor, taken_UE: Tensor, limit: int, *, min_count: int = 1
) -> list[list[TopToken]]:
    """`top_tokens` from counts.

    Args:
        token_U: (U,) int64, token ids, ascending.
        count_U: (U,) int64, how often each occurs.
        taken_UE: (U, E) int32, how often each expert takes it.
        limit, min_count: as in `top_tokens`.
    """
    frequent_U = count_U >= min_count
    token_U, count_U, taken_UE = token_U[frequent_U], count_U[frequent_U], taken_UE[frequent_U]
    # Stable sorts, the least significant key first; the ids are already ascending.
    order_U = count_U.argsort(descending=True, stable=True)
    token_U, count_U = token_U[order_U], count_U[order_U]
    probability_UE = taken_UE[order_U].double() / count_U[:, None]
    best_UE = probability_UE.argsort(dim=0, descending=True, stable=True)[:limit]
    return [
        [
            TopToken(int(token_U[i]), float(probability_UE[i, expert]), int(count_U[i]))
            for i in best_UE[:, expert]
            if probability_UE[i, expert] > 0
        ]
        for expert in range(taken_UE.shape[1])
    ]


def chunk_sparsity(active_LTE: Tensor, sequence_T: Tensor, chunk: int, mask_T: Tensor | None = None) -> Tensor:
    """Chunk-level sparsity CLS_n: share of experts that none of n consecutive tokens uses (BlockFFN).

    Each sequence is cut into chunks from its start; an incomplete chunk at its end is left out. CLS_1 is the
    token-level sparsity.

    Args:
        active_LTE: (L, T, E) bool.
        sequence_T: (T,) int64, sequence of each token; tokens of a sequence are consecutive rows, in order.
        chunk: n, tokens per chunk.
        mask_T: (T,) bool, tokens to count; all by default. The tokens around a masked one become neighbours.

    Returns:
        (L,) float64, in 0..1: the mean over chunks of 1 - |union of the tokens' experts| / E.

    Raises:
        ConfigError: if `chunk` is not positive.
    """
    used_L, slots = chunk_sums(_keep(active_LTE, mask_T), sequence_T if mask_T is None else sequence_T[mask_T], chunk)
    return 1 - used_L.double() / slots


def chunk_sums(active_LTE: Tensor, sequence_T: Tensor, chunk: int) -> tuple[Tensor, int]:
    """The parts of `chunk_sparsity`: used (chunk, expert) pairs of each layer, (L,) int64, and how many there are.

    Sums over parts of a text are the sums of the whole if no sequence is divided.
    """
    if chunk < 1:
        raise ConfigError(f"a chunk needs at least one token, not {chunk}")
    _, length_S = sequence_T.unique_consecutive(return_counts=True)
    end_T = length_S.cumsum(0).repeat_interleave(length_S)
    row_T = torch.arange(len(sequence_T), device=sequence_T.device)
    offset_T = row_T - (end_T - length_S.repeat_interleave(length_S))
    start_N = row_T[(offset_T % chunk == 0) & (row_T + chunk <= end_T)]
    union_LNE = torch.zeros_like(active_LTE[:, start_N])
    for i in range(chunk):
        union_LNE |= active_LTE[:, start_N + i]
    return union_LNE.sum(dim=(1, 2)), len(start_N) * active_LTE.shape[2]


def expert_reuse(active_LTE: Tensor, sequence_T: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Share of a token's experts that the next token of its sequence also uses (BlockFFN).

    Args:
        active_LTE: (L, T, E) bool.
        sequence_T: (T,) int64, sequence of each token; tokens of a sequence are consecutive rows, in order.
        mask_T: (T,) bool, tokens to count; all by default. The tokens around a masked one become neighbours.

    Returns:
        (L,) float64, in 0..1: the mean of |S_i and S_{i+1}| / |S_i| over neighbours, where S_i is the set of active
        experts of token i. Pairs whose first token has no active expert are left out.
    """
    share_L, pairs_L = reuse_sums(_keep(active_LTE, mask_T), sequence_T if mask_T is None else sequence_T[mask_T])
    return share_L / pairs_L


def reuse_sums(active_LTE: Tensor, sequence_T: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of `expert_reuse`: summed shares, (L,) float64, and counted neighbours, (L,) int64.

    Sums over parts of a text are the sums of the whole if no sequence is divided.
    """
    same_sequence_T = sequence_T[1:] == sequence_T[:-1]
    shared_LT = (active_LTE[:, 1:] & active_LTE[:, :-1]).sum(dim=2).double()
    size_LT = active_LTE[:, :-1].sum(dim=2)
    counts_LT = same_sequence_T & (size_LT > 0)
    share_LT = torch.where(counts_LT, shared_LT / size_LT, 0)
    return share_LT.sum(dim=1), counts_LT.sum(dim=1)


def _keep(active_LTE: Tensor, mask_T: Tensor | None) -> Tensor:
    return active_LTE if mask_T is None else active_LTE[:, mask_T]


def _ratio(part: Tensor, whole: int) -> float:
    return int(part) / whole if whole else float("nan")


def _entropy(probability_LN: Tensor) -> Tensor:
    """(L,) entropies in nats, where 0 log 0 = 0."""
    return -torch.xlogy(probability_LN, probability_LN).sum(dim=1)


def _ranks(x_N: Tensor) -> Tensor:
    """(N,) float64 ranks from 1; equal values share their mean rank."""
    _, index_N, count_U = x_N.unique(return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0).double()
    return (last_U - (count_U - 1) / 2)[index_N]
