"""Summary of a model's routing: the numbers for tables and figures.

Legend: L layers, E experts, C domains, U distinct token ids.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remoe.lab.analysis import measures
from remoe.lab.analysis.collect import RoutingRecord

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


def routing_of(record: RoutingRecord, k: int, text_of: Callable[[int], str]) -> RoutingSummary:
    """Summarises the routing of a model.

    Args:
        record: the routing.
        k: target number of active experts per token.
        text_of: returns the text of a token id.
    """
    active_LTE = record.active_LTE
    by_token = measures.active_by_token(active_LTE, record.token_T, min_count=MIN_COUNT)
    correlation = by_token.frequency_correlation
    special = measures.specialisation(active_LTE, record.domain_T, len(record.domains))
    share_LE = measures.routed_share(active_LTE)
    figures = RoutingFigures(
        inactive_experts=int(measures.inactive_experts(share_LE, k).sum()),
        frequency_correlation=None if math.isnan(correlation) else correlation,
        sparsity_per_layer=measures.sparsity_per_layer(active_LTE).tolist(),
        load_imbalance_per_layer=_known_numbers(measures.load_imbalance(active_LTE)),
        specialisation_per_layer=_known_numbers(special.normalised_L),
        chunk_sparsity_per_layer=_known_numbers(measures.chunk_sparsity(active_LTE, record.sequence_T, CHUNK)),
        expert_reuse_per_layer=_known_numbers(measures.expert_reuse(active_LTE, record.sequence_T)),
    )
    top_tokens = [
        [
            [text_of(top.token) for top in tops]
            for tops in measures.top_tokens(active_TE, record.token_T, TOP, min_count=TOP_MIN_COUNT)
        ]
        for active_TE in active_LTE
    ]
    seen_C = torch.bincount(record.domain_T, minlength=len(record.domains)) > 0
    share_CLE = measures.routed_share_by_domain(active_LTE, record.domain_T, len(record.domains))[seen_C]
    return RoutingSummary(
        figures,
        rounded(share_LE.tolist()),
        rounded(share_CLE.tolist()),
        [domain for domain, seen in zip(record.domains, seen_C.tolist(), strict=True) if seen],
        by_token.count_U.tolist(),
        rounded(by_token.active_U.tolist()),
        top_tokens,
    )


def rounded(value: Any) -> Any:
    """A number, or nested lists of numbers, rounded to four significant digits."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _known_numbers(value_L: Tensor) -> list[float | None]:
    """Rounded values, with None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else rounded(value) for value in value_L.tolist()]
