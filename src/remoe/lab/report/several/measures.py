"""The numbers of a comparison: a table of measures, and how each model uses its layers and experts.

Legend: L layers, E experts, C domains, U distinct token ids.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from remoe.lab.analysis.between import Predictability, predictability
from remoe.lab.analysis.measures import inactive_below
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.summary import CHUNK, RoutingSummary, rounded, routing_of
from remoe.lab.report.several.aligned import Alignment
from remoe.lab.report.several.training import FIRST_STEPS
from remoe.lab.text import short_name

if TYPE_CHECKING:
    from remoe.lab.report.several.models import Compared

DIGITS = 5


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of a domain: the sum in nats, and the tokens that have one."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What the text shows about a model: its loss by domain, and its routing."""

    losses: dict[str, Loss]
    summary: RoutingSummary
    guesses: list[Predictability]


def measure(record: RoutingRecord) -> Measured:
    """Measures a record."""
    guesses = [predictability(record, layer) for layer in range(record.about.layers)]
    return Measured(losses_of(record), routing_of(record), guesses)


def losses_of(record: RoutingRecord) -> dict[str, Loss]:
    """The loss of each domain; without tokens whose loss is unknown."""
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for block in record.blocks(()):
        for domain in block.domain_T.unique().tolist():
            loss_T = block.loss_T[(block.domain_T == domain) & ~block.loss_T.isnan()].double()
            nats[record.about.domains[domain]] += loss_T.sum().item()
            tokens[record.about.domains[domain]] += len(loss_T)
    return {domain: Loss(nats[domain], tokens[domain]) for domain in record.about.domains}


def table_of(
    models: "list[Compared]", measured: list[Measured | None], aligned: Alignment | None
) -> list[dict[str, Any]]:
    """The rows of the table of measures.

    Args:
        models: the first is the reference.
        measured: of each model; None for one without routing.
        aligned: how their texts correspond; None if fewer than two have routing.

    Returns:
        For each row, name, words (how to read it) and values, one for each model, None if unknown. Rows that no model
        has are left out.
    """
    rows = [] if aligned is None else _loss_rows(measured, aligned)
    rows += [(name, words, [one and value(model, one) for model, one in zip(models, measured, strict=True)])
             for name, words, value in _ROUTING]  # fmt: skip
    rows += [
        (name, words, [model.training and model.training.figures.get(key) for model in models])
        for name, words, key in _TRAINING
    ]
    words = "Of reading this text and recording it on this machine; the median over the batches."
    rows.append(("reading speed, tokens/s", words, [model.speed for model in models]))
    return [
        {"name": name, "words": words, "values": [_number(value) for value in values]}
        for name, words, values in rows
        if any(_number(value) is not None for value in values)
    ]


def _loss_rows(measured: list[Measured | None], aligned: Alignment) -> list[tuple[str, str, list[float | None]]]:
    unit = "nats per token" if aligned.tokens else "nats per character"
    of_all = [one and _loss(one, aligned, range(len(aligned.domains))) for one in measured]
    rows = [(f"loss, {unit}", "Mean cross-entropy over the text. Lower is better.", of_all)]
    if len(aligned.domains) > 1:
        for number, domain in enumerate(aligned.domains):
            values = [one and _loss(one, aligned, [number]) for one in measured]
            rows.append((f"loss on {short_name(domain)}", f"The same for this domain, in {unit}.", values))
    return rows


def _loss(one: Measured, aligned: Alignment, domains: Any) -> float | None:
    losses = [one.losses[aligned.domains[number]] for number in domains]
    tokens = sum(loss.tokens for loss in losses)
    if not tokens:
        return None
    over = tokens if aligned.characters is None else sum(aligned.characters[number] for number in domains)
    return sum(loss.nats for loss in losses) / over


def _sparsity(model: "Compared", one: Measured) -> float:
    return statistics.fmean(one.summary.figures.sparsity_per_layer)


def _active(model: "Compared", one: Measured) -> float:
    return model.record.about.experts * (1 - _sparsity(model, one))


def _guessed(place: int) -> Any:
    """Mean over the layers, weighted by their pairs, as `RoutingFigures.over_pairs`."""

    def value(model: "Compared", one: Measured) -> float | None:
        pairs = [(sum(share_E), guess[place]) for share_E, guess in zip(one.summary.share_LE, one.guesses, strict=True)]
        known = [(weight, share) for weight, share in pairs if not math.isnan(share)]
        total = sum(weight for weight, _ in known)
        return sum(weight * share for weight, share in known) / total if total else None

    return value


def _figure(measure: str) -> Any:
    """Mean of a measure of the layers, weighted by their pairs."""
    return lambda model, one: one.summary.figures.over_pairs(measure)


def _dead(model: "Compared", one: Measured) -> float:
    return one.summary.figures.inactive_experts / (model.record.about.layers * model.record.about.experts)


_ROUTING = (
    ("experts per token and layer", "Mean number of active experts.", _active),
    (
        "target experts per token",
        "What training aims for: k, times the granularity.",
        lambda model, one: model.record.about.k,
    ),
    ("experts per layer", "Experts that a token can be sent to.", lambda model, one: model.record.about.experts),
    ("sparsity S", "Share of (token, expert) pairs that are inactive.", _sparsity),
    (
        "load, busiest / mean",
        "Load of a layer's busiest expert divided by the mean load; 1 is even.",
        _figure("load_imbalance"),
    ),
    ("dead experts, share", "Share of the experts that take less than an eighth of the target load.", _dead),
    (
        "specialisation",
        "How much a token's expert reveals about its domain, from 0 (nothing) to 1 (everything).",
        _figure("specialisation"),
    ),
    (
        "predicted from load",
        "Share of a token's experts that are guessed right from the load of the experts alone.",
        _guessed(0),
    ),
    ("predicted from one layer", "The same from the token's experts in the layer before.", _guessed(1)),
    ("predicted from two layers", "The same from its experts in the two layers before.", _guessed(2)),
    ("reuse", "Share of a token's experts that the next token also uses.", _figure("expert_reuse")),
    (
        f"sparsity of {CHUNK} tokens",
        f"Share of experts that none of {CHUNK} consecutive tokens uses.",
        lambda model, one: one.summary.figures.mean_chunk_sparsity,
    ),
    (
        "experts ~ frequency",
        "Rank correlation of a token id's number of experts and its frequency; negative if rare tokens get more.",
        lambda model, one: one.summary.figures.frequency_correlation,
    ),
)
_TRAINING = (
    ("validation loss, nats per token", "Of all validation data, at the end of training.", "validation_loss"),
    ("settling step", "Step from which the sparsity stays near its target.", "settling_step"),
    (f"S after step {FIRST_STEPS}, mean", "Over the later steps of training.", "sparsity_mean"),
    (
        f"S after step {FIRST_STEPS}, deviation",
        "The smaller, the more stable the number of experts.",
        "sparsity_deviation",
    ),
    (
        "flip rate",
        "Share of (token, expert) pairs that change in one training step; mean over the second half of the steps.",
        "flip_rate",
    ),
    ("training speed, tokens/s", "Median over the steps, on the machine that trained the model.", "tokens_per_second"),
)


def layers_of(one: Measured, experts: int) -> dict[str, list[float | None]]:
    """The measures of each layer, (L,), None where there is nothing to measure."""
    figures = one.summary.figures
    return {
        "active": [rounded(sum(share_E)) for share_E in one.summary.share_LE],
        "sparsity": [rounded(1 - sum(share_E) / experts) for share_E in one.summary.share_LE],
        "imbalance": figures.load_imbalance_per_layer,
        "specialisation": figures.specialisation_per_layer,
        "reuse": figures.expert_reuse_per_layer,
        "fromOne": [_number(guess.from_one) for guess in one.guesses],
    }


def experts_of(one: Measured, record: RoutingRecord, domains: list[str]) -> dict[str, Any]:
    """Load of each expert, (L, E), and by domain, in the order of `domains`, (C, L, E); and experts by frequency."""
    summary = one.summary
    return {
        "share": summary.share_LE,
        "inactiveBelow": inactive_below(record.about.experts, record.about.k),
        "domainShare": [summary.share_CLE[summary.domains.index(domain)] for domain in domains],
        "frequency": {"count": summary.count_U, "active": summary.active_U}
        | octaves(summary.count_U, summary.active_U),
    }


def octaves(count_U: list[int], active_U: list[float]) -> dict[str, list[float]]:
    """Means of token ids whose counts are within a factor of two: their mean count, `at`, and experts, `mean`."""
    of: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for count, active in zip(count_U, active_U, strict=True):
        of[count.bit_length()].append((count, active))
    means_N2 = [torch.tensor(of[octave], dtype=torch.float64).mean(dim=0).tolist() for octave in sorted(of)]
    return {"at": [rounded(at) for at, _ in means_N2], "mean": [rounded(mean) for _, mean in means_N2]}


def _number(value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    return float(f"{value:.{DIGITS}g}")
