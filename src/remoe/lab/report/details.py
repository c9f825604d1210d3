"""Contents of a report on single experts and on the layers before: what each expert goes together with, and does.

Legend: L layers, E experts, C domains.
"""

import math
from typing import Any

import torch
from torch import Tensor

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
from remoe.lab.report.packed import short
from remoe.lab.text import lines, short_name

NEAR, CONTEXTS = 3, 3  # shown for each expert
CONTEXT_CHARACTERS = 120  # on either side of a token, and of the token
MAX_FLOW = 1 << 20  # numbers of all maps of flow together, 3 MB of the page
GATE_DIGITS = 3


def between_of(record: RoutingRecord) -> tuple[dict[str, Any], list[Tensor]]:
    """How the routing of a layer depends on the layers before.

    Returns:
        guesses, for each layer its `Predictability`, None for NaN; and flow, (L - 1, E, E), None if it has more than
        `MAX_FLOW` numbers. And the `flow` to each layer from 1.
    """
    L = record.about.layers
    found: list[Predictability] = [predictability(record, layer) for layer in range(L)]
    guesses = [[None if math.isnan(share) else share for share in one] for one in found]
    flows = [flow(record, layer) for layer in range(1, L)]
    fits = 0 < (L - 1) * record.about.experts**2 <= MAX_FLOW
    return {"guesses": guesses, "flow": short(torch.stack(flows).numpy()) if fits else None}, flows


def experts_of(record: RoutingRecord, flows: list[Tensor]) -> dict[str, Any]:
    """For each layer and expert: experts that follow in the next layer, experts of similar tokens, and contexts."""
    L = record.about.layers
    return {
        "next": [_shares(nearest(flow_EE, NEAR)) for flow_EE in flows],
        "near": [_shares(nearest(coactivation(record, layer), NEAR, others=True)) for layer in range(L)],
        "contexts": [
            [
                [[_part(one.before, -1), _part(one.token), _part(one.after), _short(one.gate)] for one in contexts]
                for contexts in strongest_contexts(record, layer, CONTEXTS)
            ]
            for layer in range(L)
        ],
    }


def effects_of(source: Source, domains: list[str], max_tokens: int) -> dict[str, Any]:
    """The effect of each expert: all, (L, E); byDomain, (C, L, E); and the tokens, of all domains and of each."""
    assert source.mixture is not None
    found = expert_effects(source.mixture, source.text, domains, max_tokens, document_end=source.document_end)
    return {
        "tokens": int(found.tokens_C.sum()),
        "domainTokens": found.tokens_C.tolist(),
        "domains": [short_name(domain) for domain in found.domains],
        "all": rounded(found.effect_LE.tolist()),
        "byDomain": rounded(found.effect_CLE.tolist()),
    }


def _part(text: str, side: int = 1) -> str:
    """The part of a context that is shown: its end before the token, and otherwise its beginning."""
    if len(text) > CONTEXT_CHARACTERS:
        text = "…" + text[-CONTEXT_CHARACTERS:] if side < 0 else text[:CONTEXT_CHARACTERS] + "…"
    return lines(text)


def _shares(experts: list[list[Near]]) -> list[list[list[float]]]:
    return [[[one.expert, rounded(one.share)] for one in near] for near in experts]


def _short(gate: float) -> float:
    return float(f"{gate:.{GATE_DIGITS}g}")
