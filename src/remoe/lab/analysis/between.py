"""How the routing of a layer depends on that of the layers before, and which experts belong together.

All functions read a record in blocks, so that memory does not grow with the number of tokens.

Legend: L layers, T tokens, E experts, C domains.
"""

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.lab.analysis.record import RoutingRecord

CONTEXT = 8  # tokens before and after


class Predictability(NamedTuple):
    """Share of a token's experts in one layer that are guessed right, in 0..1; NaN without tokens to guess for.

    Attributes:
        by_load: from the load of the experts alone: the layer's busiest ones.
        from_one: from the token's experts in the layer before.
        from_two: from those in the two layers before.
    """

    by_load: float
    from_one: float
    from_two: float


class Context(NamedTuple):
    """A token that an expert gives a large gate, with the text before and after it."""

    before: str
    token: str
    after: str
    gate: float


class Near(NamedTuple):
    """Another expert, and a share in 0..1."""

    expert: int
    share: float


def flow(record: RoutingRecord, layer: int) -> Tensor:
    """Which experts follow which: (E, E) float64, the share of a row's tokens in `layer` - 1 that the column's expert
    of `layer` takes.

    A row sums to the mean number of experts that those tokens have in `layer`; that of an unused expert is NaN.
    """
    both_EE, before_E = _pairs(record, layer, layer - 1)
    return both_EE / before_E[:, None]


def coactivation(record: RoutingRecord, layer: int) -> Tensor:
    """How alike the tokens of two experts of a layer are: (E, E) float64, tokens of both over tokens of either.

    The diagonal is 1, or NaN for an expert without tokens; so is a pair of two such experts.
    """
    both_EE, count_E = _pairs(record, layer, layer)
    return both_EE / (count_E[:, None] + count_E[None, :] - both_EE)


def nearest(share_EE: Tensor, limit: int, *, others: bool = False) -> list[list[Near]]:
    """The columns with the largest shares of each row, by decreasing share, then increasing number.

    Args:
        share_EE: (E, E), such as `flow` or `coactivation` returns; zero and NaN are left out.
        limit: the most columns.
        others: leave out the row's own expert.
    """
    share_EE = share_EE.nan_to_num(0).clone()
    if others:
        share_EE.fill_diagonal_(0)
    order_EE = share_EE.argsort(dim=1, descending=True, stable=True)[:, :limit]
    return [
        [Near(e, share_E[e].item()) for e in order_E.tolist() if share_E[e] > 0]
        for share_E, order_E in zip(share_EE, order_EE, strict=True)
    ]


def predictability(record: RoutingRecord, layer: int) -> Predictability:
    """How well the experts of `layer` are guessed from the layers before.

    P(expert | expert of an earlier layer) is counted on sequences of even number. For each token of the others, as many
    experts are guessed as it has: those whose mean P, over all its experts in the layers before, is the largest. A
    token without experts there is guessed by load. At equal P the lower number counts as larger.

    Args:
        record: the routing.
        layer: from 0. A layer that has no layer before, or only one, has NaN in `from_one` and `from_two`.
    """
    befores = [before for before in (layer - 1, layer - 2) if before >= 0]
    counted = [_pairs(record, layer, before, even=True) for before in befores]
    tokens, load_E = 0, torch.zeros(record.about.experts, dtype=torch.float64)
    for block in record.blocks((layer,)):
        even_T = block.sequence_T % 2 == 0
        tokens += int(even_T.sum())
        load_E += block.active_LTE[0, even_T].sum(dim=0)
    load_E = load_E / max(tokens, 1)
    given = [torch.where(count_E[:, None] > 0, both_EE / count_E[:, None], load_E) for both_EE, count_E in counted]
    hits, guessed = [0.0, 0.0, 0.0], 0
    for block in record.blocks((layer, *befores)):
        odd_T = block.sequence_T % 2 == 1
        active_TE, *before = block.active_LTE[:, odd_T].double()
        active_TE = active_TE[(known_T := active_TE.any(dim=1))]
        guessed += len(active_TE)
        sum_TE, size_T1 = torch.zeros_like(active_TE), torch.zeros(len(active_TE), 1, dtype=torch.float64)
        hits[0] += _hits(load_E.expand_as(active_TE), active_TE)
        for i, (before_TE, given_EE) in enumerate(zip(before, given, strict=True), start=1):
            sum_TE = sum_TE + before_TE[known_T] @ given_EE
            size_T1 = size_T1 + before_TE[known_T].sum(dim=1, keepdim=True)
            hits[i] += _hits(torch.where(size_T1 > 0, sum_TE / size_T1, load_E), active_TE)
    shares = [hit / guessed if guessed and i <= len(befores) and tokens else math.nan for i, hit in enumerate(hits)]
    return Predictability(*shares)


def strongest_contexts(record: RoutingRecord, layer: int, limit: int) -> list[list[Context]]:
    """For each expert of a layer, the tokens with the largest gates in size, and the text around them.

    At equal gates, earlier tokens come first. Empty lists for a record without gates or texts.
    """
    best: list[list[tuple[float, int, Context]]] = [[] for _ in range(record.about.experts)]
    row = 0
    for block in record.blocks((layer,), gates=True, texts=True):
        if block.gate_LTE is None or block.texts is None:
            break
        size_TE = block.gate_LTE[0].abs().where(block.active_LTE[0], -1).nan_to_num(-1)
        order = size_TE.argsort(dim=0, descending=True, stable=True)[:limit]
        for expert, found in enumerate(best):
            for t in order[:, expert].tolist():
                size = size_TE[t, expert].item()
                if size < 0 or block.texts[t] is None or (len(found) == limit and size <= found[0][0]):
                    continue
                context = _context(block.texts, block.sequence_T, t, block.gate_LTE[0, t, expert].item())
                entry = (size, -(row + t), context)
                if len(found) < limit:
                    heapq.heappush(found, entry)
                else:
                    heapq.heapreplace(found, entry)
        row += len(block.token_T)
    return [[context for *_, context in sorted(found, reverse=True)] for found in best]


def _context(texts: list[str], sequence_T: Tensor, t: int, gate: float) -> Context:
    same = [i for i in range(max(0, t - CONTEXT), min(len(texts), t + CONTEXT + 1)) if sequence_T[i] == sequence_T[t]]
    before, after = (["" if texts[i] is None else texts[i] for i in same if (i - t) * sign > 0] for sign in (-1, 1))
    return Context("".join(before), texts[t], "".join(after), gate)


def _pairs(record: RoutingRecord, layer: int, before: int, *, even: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens with an expert of `before` and one of `layer`, (E, E), and tokens of each of the first, (E,), float64."""
    E = record.about.experts
    both_EE, count_E = torch.zeros(E, E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for block in record.blocks((before, layer)):
        active_LTE = block.active_LTE[:, block.sequence_T % 2 == 0] if even else block.active_LTE
        before_TE, after_TE = active_LTE.float()  # exact: a block has fewer than 2^24 tokens
        both_EE += before_TE.T @ after_TE
        count_E += before_TE.sum(dim=0)
    return both_EE, count_E


def _hits(score_TE: Tensor, active_TE: Tensor) -> float:
    """Sum over tokens of the share of their experts among as many of the highest scores."""
    order_TE = score_TE.argsort(dim=1, descending=True, stable=True)
    size_T1 = active_TE.sum(dim=1, keepdim=True)
    guessed_TE = torch.arange(active_TE.shape[1]) < size_T1
    return ((active_TE.gather(1, order_TE) * guessed_TE).sum(dim=1) / size_T1[:, 0]).sum().item()
