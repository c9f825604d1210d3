"""Contents of a report on single experts and on the layers before: what each expert goes together with, and does.

Legend: L layers, E experts, C domains.
"""

import math
from typing import Any

from remoe.lab.analysis.between import (
    Near,
    Predictability,
    coactivation,
    flow,
    nearest,
    predictability,
    strongest_contexts,
)
from remoe.lab.analysis.effect import expert_effects
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.summary import rounded
from remoe.lab.text import lines, short_name

NEAR, CONTEXTS = 3, 3  # shown for each expert
GATE_DIGITS = 3


def guesses_of(record: RoutingRecord) -> list[list[float | None]]:
    """For each layer, its `Predictability`; None for NaN."""
    found: list[Predictability] = [predictability(record, layer) for layer in range(record.about.layers)]
    return [[None if math.isnan(share) else share for share in one] for one in found]


def experts_of(record: RoutingRecord) -> dict[str, Any]:
    """For each layer and expert: experts that follow in the next layer, experts of similar tokens, and contexts."""
    L = record.about.layers
    return {
        "next": [_shares(nearest(flow(record, layer), NEAR)) for layer in range(1, L)],
        "near": [_shares(nearest(coactivation(record, layer), NEAR, others=True)) for layer in range(L)],
        "contexts": [
            [
                [[lines(one.before), lines(one.token), lines(one.after), _short(one.gate)] for one in contexts]
                for contexts in strongest_contexts(record, layer, CONTEXTS)
            ]
            for layer in range(L)
        ],
    }


def effects_of(source: Source, domains: list[str], max_tokens: int) -> dict[str, Any]:
    """The effect of each expert: all, (L, E); byDomain, (C, L, E); and tokens and loss of each domain."""
    assert source.mixture is not None
    found = expert_effects(source.mixture, source.text, domains, max_tokens, document_end=source.document_end)
    return {
        "tokens": int(found.tokens_C.sum()),
        "domains": [short_name(domain) for domain in found.domains],
        "all": rounded(found.effect_LE.tolist()),
        "byDomain": rounded(found.effect_CLE.tolist()),
    }


def _shares(experts: list[list[Near]]) -> list[list[list[float]]]:
    return [[[one.expert, rounded(one.share)] for one in near] for near in experts]


def _short(gate: float) -> float:
    return float(f"{gate:.{GATE_DIGITS}g}")
