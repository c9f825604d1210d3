"""One text in several models: token by token if all have the same token ids, and otherwise by characters.

Where tokenizers differ, the text is cut where all of them end a token. White space is not compared, because some
tokenizers change it, and special tokens, such as the end of a document, are left out.

Legend: T tokens of a domain, N spans of a domain.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remoe.errors import DataError
from remoe.lab.analysis.record import UNKNOWN, RoutingRecord
from remoe.lab.analysis.texts import TokenTexts
from remoe.lab.text import visible

if TYPE_CHECKING:
    from remoe.lab.report.several.models import Compared


@dataclass(frozen=True)
class Alignment:
    """How the tokens of the models correspond.

    Attributes:
        domains: names of the domains that have tokens, as in the reference.
        tokens: whether all models have the same token ids.
        ends: for each domain, and then each model, (N,) how many of its tokens there are up to the end of each span;
            None if each token is a span.
        characters: for each domain, the length of its text; None if each token is a span.
    """

    domains: list[str]
    tokens: bool
    ends: list[list[np.ndarray]] | None
    characters: list[int] | None


def align(models: "list[Compared]") -> Alignment:
    """Aligns models with routing; the first is the reference.

    Raises:
        DataError: if they read different texts, or the text of one is unknown.
    """
    reference, *others = models
    ids = [_ids(model.record) for model in models]
    domains = [domain for domain, of in ids[0].items() if of.tokens]
    for model, found in zip(others, ids[1:], strict=True):
        given = [domain for domain, of in found.items() if of.tokens]
        if set(given) != set(domains):
            raise DataError(
                f"{model.name} reads other domains than {reference.name}: {_some(given)}, not {_some(domains)}"
            )
    if all(of[domain].known and of[domain] == ids[0][domain] for of in ids for domain in domains):
        return Alignment(domains, True, None, None)
    texts = [_texts(model) for model in models]
    for model, found in zip(others, texts[1:], strict=True):
        for domain in domains:
            _check_same(reference.name, texts[0][domain], model.name, found[domain], domain)
    ends = [common_ends([_widths(of[domain]) for of in texts]) for domain in domains]
    return Alignment(domains, False, ends, [sum(map(len, texts[0][domain])) for domain in domains])


def common_ends(widths: list[np.ndarray]) -> list[np.ndarray]:
    """Cuts a text where all tokenizers end a token.

    Args:
        widths: for each tokenizer (T,), the characters of each of its tokens; they add up to the same sum.

    Returns:
        For each tokenizer (N,), how many of its tokens there are up to the end of each span. A token without characters
        belongs to the span that follows; at the end of the text, to none.
    """
    reached = [(width_T.cumsum()[width_T > 0], np.flatnonzero(width_T > 0) + 1) for width_T in widths]
    common_N = reached[0][0]
    for place_T, _ in reached[1:]:
        common_N = np.intersect1d(common_N, place_T)
    return [end_T[np.searchsorted(place_T, common_N)] for place_T, end_T in reached]


@dataclass(frozen=True)
class _Ids:
    """The token ids of a domain: their number, their hash, and whether all are known."""

    tokens: int
    hash: str
    known: bool


def _ids(record: RoutingRecord) -> dict[str, _Ids]:
    hashes = [hashlib.sha256() for _ in record.about.domains]
    tokens, known = [0] * len(hashes), [True] * len(hashes)
    for block in record.blocks(()):
        for domain in block.domain_T.unique().tolist():
            token_T = block.token_T[block.domain_T == domain]
            hashes[domain].update(token_T.numpy().astype("<i8").tobytes())
            tokens[domain] += len(token_T)
            known[domain] &= bool((token_T != UNKNOWN).all())
    found = zip(tokens, (one.hexdigest() for one in hashes), known, strict=True)
    return {name: _Ids(*one) for name, one in zip(record.about.domains, found, strict=True)}


def _texts(model: "Compared") -> dict[str, list[str]]:
    """The text of each token, by domain; that of special tokens is empty.

    With the tokenizer, a domain is decoded as a whole, because a record has a part of a character at the end of some
    sequences.
    """
    ids: dict[str, list[int]] = {domain: [] for domain in model.record.about.domains}
    texts: dict[str, list[str]] = {domain: [] for domain in ids}
    for block in model.record.blocks((), texts=True):
        for domain, token, text in zip(block.domain_T.tolist(), block.token_T.tolist(), block.texts, strict=True):
            name = model.record.about.domains[domain]
            ids[name].append(token)
            if model.tokenizer is None:
                if text is None:
                    raise DataError(f"{model.name} does not have the text of its tokens, so it cannot be compared")
                texts[name].append(text)
    if model.tokenizer is None:
        return texts
    special, decode = set(model.tokenizer.all_special_ids), TokenTexts(model.tokenizer)
    for name, tokens in ids.items():
        plain = iter(decode([token for token in tokens if token not in special]))
        texts[name] = ["" if token in special else next(plain) for token in tokens]
    return texts


def _widths(texts: list[str]) -> np.ndarray:
    return np.array([len("".join(text.split())) for text in texts], np.int64)


def _check_same(name: str, texts: list[str], other: str, found: list[str], domain: str) -> None:
    here, there = ("".join("".join(one).split()) for one in (texts, found))
    if here == there:
        return
    at = next(
        (i for i, (one, two) in enumerate(zip(here, there, strict=False)) if one != two), min(len(here), len(there))
    )
    parts = [f"{visible(text[max(0, at - 10) : at + 10])!r}" for text in (here, there)]
    raise DataError(
        f"{name} and {other} read different texts: in domain {visible(domain)!r} at character {at + 1:,}, "
        f"{parts[0]} and {parts[1]}"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(visible, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
