"""The text of a page: tokens of each domain with their experts, gates and losses.

Legend: L layers, T tokens, E experts, P executed pairs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remoe.lab.analysis.record import UNKNOWN, Block, RoutingRecord
from remoe.lab.report.packed import exact, short, unpacked, whole_numbers
from remoe.lab.text import lines, short_name

ROWS = 4096  # read at a time
MAX_PAIRS = 2_500_000  # of all domains together, about 8 MB of the page
LONGEST_TOKEN = 200  # characters of a token that are shown


@dataclass
class _Domain:
    tokens: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = field(default_factory=list)
    losses: list[np.ndarray] = field(default_factory=list)
    pairs: int = 0
    full: bool = False
    cut: bool = False


def text_of(record: RoutingRecord, length: int, most: int | None = None) -> dict[str, Any]:
    """The first tokens of each domain, and how they were routed.

    Args:
        record: the routing.
        length: tokens of each domain, or fewer if its text is shorter or all pairs would be more than `most`.
        most: by default `MAX_PAIRS`.

    Returns:
        gatesKnown; same, the number of experts that each token has in every layer, None if it varies; and texts, for
        each domain that has tokens: domain, tokens (T,); counts (L, T), the number of experts; expert (P,) and gate
        (P,), ordered by layer, token and expert, gate None if unknown; loss (T,) in nats, NaN if unknown; seen (T,),
        how often the token's id occurs in the record, 0 if unknown; cut, whether the text ends because of `most`.
    """
    found = [_Domain() for _ in record.about.domains]
    most = (most or MAX_PAIRS) // max(1, len(found))
    for block in record.blocks(gates=True, texts=True, rows=ROWS):
        for domain in block.domain_T.unique().tolist():
            if not found[domain].full:
                _add(found[domain], block, (block.domain_T == domain).nonzero().flatten().numpy(), length, most)
        if all(one.full for one in found):
            break
    seen = _seen(record)
    texts = [
        {"domain": short_name(name), **_section(one, seen)}
        for name, one in zip(record.about.domains, found, strict=True)
        if one.tokens
    ]
    counts = [unpacked(text["counts"]) for text in texts]
    found = {int(count) for one in counts for count in (one.min(), one.max())}
    return {"gatesKnown": record.about.gates, "same": found.pop() if len(found) == 1 else None, "texts": texts}


def _add(domain: _Domain, block: Block, rows: np.ndarray, length: int, most: int) -> None:
    rows = rows[: length - len(domain.tokens)]
    active_LTE = block.active_LTE[:, rows].numpy()
    before_T = domain.pairs + active_LTE.sum(axis=(0, 2)).cumsum()
    kept = int((before_T <= most).sum())
    domain.cut = kept < len(rows)
    rows, active_LTE = rows[:kept], active_LTE[:, :kept]
    expert_P = active_LTE.nonzero()[2]
    gate_P = None if block.gate_LTE is None else block.gate_LTE[:, rows].numpy()[active_LTE]
    domain.blocks.append((active_LTE.sum(axis=2), expert_P, gate_P))
    domain.pairs += len(expert_P)
    ids = block.token_T[rows].tolist()
    texts = block.texts or []
    domain.tokens += [shown_text(texts[row], token) for row, token in zip(rows.tolist(), ids, strict=True)]
    domain.ids += ids
    domain.losses.append(block.loss_T[rows].numpy())
    domain.full = domain.cut or len(domain.tokens) >= length


def _section(domain: _Domain, seen: Counter[int]) -> dict[str, Any]:
    counts, experts, gates = zip(*domain.blocks, strict=True)
    count_LT = np.concatenate(counts, axis=1)
    known = gates[0] is not None
    expert_P, gate_P = _by_layer(counts, experts), short(_by_layer(counts, gates)) if known else None
    return {
        "tokens": domain.tokens,
        "counts": whole_numbers(count_LT),
        "expert": whole_numbers(expert_P),
        "gate": gate_P,
        "loss": exact(np.concatenate(domain.losses)),
        "seen": whole_numbers([0 if token == UNKNOWN else seen[token] for token in domain.ids]),
        "cut": domain.cut,
    }


def _by_layer(counts: Sequence[np.ndarray], blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Joins blocks whose pairs are ordered by layer to a whole that is too; `counts` has the (L, T) of each."""
    parts = [
        np.split(pairs_P, count_LT.sum(axis=1).cumsum()[:-1]) for count_LT, pairs_P in zip(counts, blocks, strict=True)
    ]
    return np.concatenate([part for layer in zip(*parts, strict=True) for part in layer])


def shown_text(text: str | None, token: int) -> str:
    """A token's text; its id, or a dot, where the record does not have it."""
    if text is None:
        return "· " if token == UNKNOWN else f"[{token}] "
    return lines(text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "…")


def _seen(record: RoutingRecord) -> Counter[int]:
    counts: Counter[int] = Counter()
    for block in record.blocks(()):
        token_U, count_U = block.token_T.unique(return_counts=True)
        counts.update(dict(zip(token_U.tolist(), count_U.tolist(), strict=True)))
    return counts
