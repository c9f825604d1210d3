"""How a model routes, in numbers that tables and figures are made of.

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
MIN_COUNT = 10  # occurrences of a token id from which its mean active experts are looked at
TOP, TOP_MIN_COUNT = 8, 50  # tokens shown of an expert, and the occurrences from which one is
DIGITS = 4


@dataclass(frozen=True)
class RoutingFigures:
    """Measures of one run; a layer has None where it has nothing to measure, as without any routed pair.

    Attributes:
        inactive_experts: experts of all layers with less than an eighth of the wanted mean load.
        frequency_correlation: Spearman's, of a token id's active experts and its frequency; None where all ids have
            the same number.
        sparsity_per_layer: (L,).
        load_imbalance_per_layer: (L,), load of the busiest expert over the mean load.
        specialisation_per_layer: (L,), mutual information of expert and domain over the entropy of the domain.
        chunk_sparsity_per_layer: (L,), experts that none of 8 neighbouring tokens uses.
        expert_reuse_per_layer: (L,), share of a token's experts that the next token uses too. None, as the one above,
            in records of before they were kept by layer.
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
        """The mean over all layers, as of S."""
        known = [value for value in self.chunk_sparsity_per_layer or [] if value is not None]
        return statistics.mean(known) if known else None

    def over_pairs(self, measure: str) -> float | None:
        """The mean of NAME_per_layer, each layer weighted by its routed pairs; None where no layer has a value.

        Without weights a layer that is almost closed would count as much as one that does all the work.
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
    """How a trained model routes about 200,000 validation tokens.

    Attributes:
        figures: its measures.
        share_LE: share of the tokens that each expert takes.
        share_CLE: the same of each domain's tokens.
        domains: names of those that have tokens, (C,).
        count_U: how often each token id occurs.
        active_U: its mean active experts.
        top_tokens: of each layer's experts, the text of the tokens that it takes most surely (Table 12); empty in
            records of before they were kept.
    """

    figures: RoutingFigures
    share_LE: list[list[float]]
    share_CLE: list[list[list[float]]]
    domains: list[str]
    count_U: list[int]
    active_U: list[float]
    top_tokens: list[list[list[str]]] = field(default_factory=list)


def routing_of(record: RoutingRecord, k: int, text_of: Callable[[int], str]) -> RoutingSummary:
    """The measures of a model's routing, and what is shown of it.

    Args:
        record: the routing.
        k: wanted active experts per token.
        text_of: the text of a token id.
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
    """A number, or numbers in lists, with four digits."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _known_numbers(value_L: Tensor) -> list[float | None]:
    """JSON has no NaN: None."""
    return [None if math.isnan(value) else rounded(value) for value in value_L.tolist()]
