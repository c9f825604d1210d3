"""The text of a comparison: the first tokens of each domain, and what each model makes of them.

Legend: L layers, T tokens, N spans, P executed pairs.
"""

from typing import Any

import numpy as np

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.report.packed import whole_numbers
from remoe.lab.report.reading import MAX_PAIRS, text_of
from remoe.lab.report.several.aligned import Alignment
from remoe.lab.text import short_name


def excerpts_of(records: list[RoutingRecord], aligned: Alignment, length: int) -> list[dict[str, Any]]:
    """For each domain, the spans that all models show.

    Args:
        records: of the models.
        aligned: how their tokens correspond.
        length: tokens of each domain, in each model; fewer if all pairs would be more than `MAX_PAIRS`.

    Returns:
        domain; tokens: their texts in the model that names them; namedBy, its number; ends, for each model (N,) how
        many of its tokens there are up to the end of each span, None if each token is a span; spans, N; models, for
        each its section of `text_of`, whose `tokens` are None if they are those above; and cut, whether the text ends
        because of `MAX_PAIRS`.
    """
    read = [text_of(record, length, MAX_PAIRS // len(records))["texts"] for record in records]
    named = next((i for i, record in enumerate(records) if _has_texts(record)), 0) if aligned.tokens else 0
    found = []
    for number, domain in enumerate(aligned.domains):
        sections = [_of_domain(record, texts, aligned, domain) for record, texts in zip(records, read, strict=True)]
        shown = [len(section["tokens"]) for section in sections]
        ends = None if aligned.ends is None else _shown(aligned.ends[number], shown)
        tokens = sections[named]["tokens"]
        found.append(
            {
                "domain": short_name(domain),
                "tokens": tokens,
                "namedBy": named,
                "ends": None if ends is None else [whole_numbers(end_N) for end_N in ends],
                "spans": min(shown) if ends is None else len(ends[0]),
                "models": [_without(section, i == named or aligned.tokens) for i, section in enumerate(sections)],
                "cut": any(section["cut"] for section in sections),
            }
        )
    return [one for one in found if one["spans"]]


def _shown(ends: list[np.ndarray], shown: list[int]) -> list[np.ndarray]:
    """The spans of which every model shows all tokens."""
    kept_N = np.all([end_N <= count for end_N, count in zip(ends, shown, strict=True)], axis=0)
    return [end_N[kept_N] for end_N in ends]


def _without(section: dict[str, Any], tokens: bool) -> dict[str, Any]:
    kept = {name: section[name] for name in ("tokens", "counts", "expert", "gate", "loss")}
    return kept | {"tokens": None} if tokens else kept


def _of_domain(record: RoutingRecord, texts: list[dict[str, Any]], aligned: Alignment, domain: str) -> dict[str, Any]:
    present = [name for name in record.about.domains if name in aligned.domains]
    return texts[present.index(domain)]


def _has_texts(record: RoutingRecord) -> bool:
    block = next(record.blocks((), texts=True, rows=1), None)
    return block is not None and block.texts is not None and block.texts[0] is not None
