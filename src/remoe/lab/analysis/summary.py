"""Summary of a model's routing: the numbers for tables and figures.

Legend: L layers, E experts, C domains, U distinct token ids.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remoe.lab.analysis import measures
from remoe.lab.analysis.record import UNKNOWN, RoutingRecord

CHUNK = 8
MIN_COUNT = 10  # fewest occurrences of a token id whose mean active experts are reported
TOP, TOP_MIN_COUNT = 8, 50  # tokens shown per expert, and the fewest occurrences of such a token
DIGITS = 4


@dataclass(frozen=True)
class RoutingFigures:
    """Measures of one run; the value of a layer is None if it has nothing to measure, such as any routed pair.

    Attributes:
        inactive_experts: number of experts, over all layers, with less than an eighth of the target load (Fig. 8).
        frequency_correlation: Spearman's correlation of a token id's active experts and its frequency (cf. Fig. 7);
            None if all ids have the same number of experts.
        sparsity_per_layer: (L,), Eq. 8.
        load_imbalance_per_layer: (L,), load of the busiest expert divided by the mean load.
        specialisation_per_layer: (L,), mutual information of expert and domain divided by the entropy of the domain.
        chunk_sparsity_per_layer: (L,), share of experts that none of 8 consecutive tokens uses (BlockFFN).
        expert_reuse_per_layer: (L,), share of a token's experts that the next token also uses (BlockFFN). This and
            chunk_sparsity_per_layer are None in old records, which did not have them per layer.
    """

    inactive_experts: int
    frequency_correlation: float | None
    sparsity_per_layer: list[float]
    load_imbalance_per_layer: list[float | None]
    specialisation_per_layer: list[float | None]
    chunk_sparsity_per_layer: list[float | None] | None = None
    expert_reuse_per_layer: list[float | None] | None = None

    @property
    def mean_chunk_sparsity(self) -> float | None:
        """Mean over the layers, unweighted as in S."""
        known = [value for value in self.chunk_sparsity_per_layer or [] if value is not None]
        return statistics.mean(known) if known else None

    def over_pairs(self, measure: str) -> float | None:
        """Mean of `{measure}_per_layer`, weighted by the layers' routed pairs; None if no layer has a value.

        Without weights, a layer with almost no active pairs would count as much as one that does all the work.
        """
        values = getattr(self, f"{measure}_per_layer") or []
        known = [
            (1 - sparsity, value)
            for sparsity, value in zip(self.sparsity_per_layer, values, strict=False)
            if value is not None and sparsity < 1
        ]
        if not known:
            return None
        return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)


@dataclass(frozen=True)
class RoutingSummary:
    """How a trained model routes validation tokens, usually about 200,000 of them.

    The figures and tables are those of ReMoE, arXiv 2412.14711.

    Attributes:
        figures: measures of the routing.
        share_LE: (L, E), share of the tokens that each expert takes (Fig. 8).
        share_CLE: (C, L, E), share of each domain's tokens that each expert takes (Fig. 9, 12).
        domains: (C,), names of the domains that have tokens.
        count_U: (U,), how often each token id occurs (Fig. 7).
        active_U: (U,), mean active experts of each token id (Fig. 7).
        top_tokens: for each layer and expert, the texts of the tokens most likely to activate it (Table 12); empty in
            old records, which did not have them.
    """

    figures: RoutingFigures
    share_LE: list[list[float]]
    share_CLE: list[list[list[float]]]
    domains: list[str]
    count_U: list[int]
    active_U: list[float]
    top_tokens: list[list[list[str]]] = field(default_factory=list)


def routing_of(record: RoutingRecord, text_of: Callable[[int], str] | None = None) -> RoutingSummary:
    """Summarises the routing of a model; the record is read layer by layer, in blocks.

    Args:
        record: the routing.
        text_of: returns the text of a token id; by default the record's text of its first occurrence.
    """
    about, ids = record.about, _TokenIds(record)
    layers = [_LayerSums(record, layer, ids) for layer in range(about.layers)]
    pairs_LCE = torch.stack([layer.pairs_CE for layer in layers])
    pairs_LE, tokens = pairs_LCE.sum(dim=1), max(about.tokens, 1)
    share_LE = pairs_LE.double() / tokens
    pairs_U = torch.stack([layer.pairs_U for layer in layers]).sum(dim=0)
    frequent_U = ids.count_U >= MIN_COUNT
    by_token = measures.TokenActivity(
        ids.token_U[frequent_U], ids.count_U[frequent_U], (pairs_U.double() / (ids.count_U * about.layers))[frequent_U]
    )
    correlation = by_token.frequency_correlation
    figures = RoutingFigures(
        inactive_experts=int(measures.inactive_experts(share_LE, about.k).sum()),
        frequency_correlation=None if math.isnan(correlation) else correlation,
        sparsity_per_layer=(1 - share_LE.mean(dim=1)).tolist(),
        load_imbalance_per_layer=_known_numbers(measures.imbalance_of(pairs_LE)),
        specialisation_per_layer=_known_numbers(measures.specialisation_of(pairs_LCE).normalised_L),
        chunk_sparsity_per_layer=_known_numbers(torch.tensor([layer.chunk_sparsity for layer in layers])),
        expert_reuse_per_layer=_known_numbers(torch.tensor([layer.reuse for layer in layers])),
    )
    text_of = text_of or (lambda token: ids.text.get(token, ""))
    seen_C = ids.tokens_C > 0
    share_CLE = (pairs_LCE.double() / ids.tokens_C[:, None]).transpose(0, 1)[seen_C]
    return RoutingSummary(
        figures,
        rounded(share_LE.tolist()),
        rounded(share_CLE.tolist()),
        [domain for domain, seen in zip(about.domains, seen_C.tolist(), strict=True) if seen],
        by_token.count_U.tolist(),
        rounded(by_token.active_U.tolist()),
        [[[text_of(top.token) for top in tops] for tops in layer.top_tokens] for layer in layers],
    )


class _TokenIds:
    """The distinct token ids of a record, how often each occurs, and how many tokens each domain has."""

    def __init__(self, record: RoutingRecord) -> None:
        counts: Counter[int] = Counter()
        self.text: dict[int, str] = {}
        self.tokens_C = torch.zeros(len(record.about.domains), dtype=torch.int64)
        for block in record.blocks((), texts=True):
            token_U, count_U = block.token_T.unique(return_counts=True)
            counts.update(dict(zip(token_U.tolist(), count_U.tolist(), strict=True)))
            for token, text in zip(block.token_T.tolist(), block.texts or (), strict=True):
                if text:
                    self.text.setdefault(token, text)
            self.tokens_C += torch.bincount(block.domain_T, minlength=len(self.tokens_C))
        counts.pop(UNKNOWN, None)
        self.token_U = torch.tensor(sorted(counts), dtype=torch.int64)
        self.count_U = torch.tensor([counts[token] for token in self.token_U.tolist()], dtype=torch.int64)


class _LayerSums:
    """Sums over the tokens of one layer: pairs of domains (C, E) and token ids (U,), and what follows from others."""

    def __init__(self, record: RoutingRecord, layer: int, ids: _TokenIds) -> None:
        C, E = len(record.about.domains), record.about.experts
        self.pairs_CE = torch.zeros(C, E, dtype=torch.int64)
        taken_UE = torch.zeros(len(ids.token_U), E, dtype=torch.int32)
        used = slots = shared = neighbours = 0.0
        for block in record.blocks((layer,)):
            self.pairs_CE += measures.pairs_by_domain(block.active_LTE, block.domain_T, C)[0]
            known_T = block.token_T != UNKNOWN
            index_T = torch.searchsorted(ids.token_U, block.token_T[known_T])
            taken_UE.index_add_(0, index_T, block.active_LTE[0, known_T].int())
            used_L, count = measures.chunk_sums(block.active_LTE, block.sequence_T, CHUNK)
            share_L, pairs_L = measures.reuse_sums(block.active_LTE, block.sequence_T)
            used, slots = used + used_L.item(), slots + count
            shared, neighbours = shared + share_L.item(), neighbours + pairs_L.item()
        self.pairs_U = taken_UE.sum(dim=1, dtype=torch.int64)
        self.top_tokens = measures.top_tokens_of(ids.token_U, ids.count_U, taken_UE, TOP, min_count=TOP_MIN_COUNT)
        self.chunk_sparsity = 1 - used / slots if slots else math.nan
        self.reuse = shared / neighbours if neighbours else math.nan


def rounded(value: Any) -> Any:
    """A number, or nested lists of numbers, rounded to four significant digits."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _known_numbers(value_L: Tensor) -> list[float | None]:
    """Rounded values, with None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else rounded(value) for value in value_L.tolist()]
