"""The data of a page: what a record of routing and a run show, as a dict of sections that JSON can hold.

The page, and everything else that shows the same, only draws what is here.

Legend: L layers, E experts, C domains.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import remoe
from remoe.convert.relufy.model import RelufiedMixin
from remoe.lab.analysis.measures import inactive_below
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.summary import CHUNK, RoutingSummary, routing_of
from remoe.lab.analysis.writing import Written
from remoe.lab.report.contents import facts, outcome, training_records
from remoe.lab.report.course import course_of
from remoe.lab.report.details import between_of, effects_of, experts_of
from remoe.lab.report.dial import dial_of
from remoe.lab.report.generation import generation_of
from remoe.lab.report.reading import text_of
from remoe.lab.text import lines, short_name


def page_data(
    source: Source | None,
    step: int | None,
    record: RoutingRecord | None,
    *,
    excerpt_tokens: int,
    effect_tokens: int = 0,
    written: Written | None = None,
    dial_tokens: int = 0,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """Everything that a page shows.

    Args:
        source: the model, or None if only a record is known.
        step: of the run's checkpoint; None without a run.
        record: the routing, or None for a model that routes no pairs.
        excerpt_tokens: of each domain, shown as text.
        effect_tokens: on which the effect of each expert is measured; 0 for none.
        dial_tokens: on which loss and speed are measured at several gate thresholds and caps; 0 for none.
        written: a text that the model wrote, whose record is `record`; None for none.
        token_text: returns the text of a token id; by default the record's.

    Returns:
        head, always; text, experts and between if there is a record; generation if there is a text that was written;
        dial if it is measured; training if the run has records of steps.
    """
    data: dict[str, Any] = {"head": head_of(source, step, record)}
    if record is not None:
        summary = routing_of(record, token_text)
        effects = None
        if effect_tokens and source is not None:
            effects = effects_of(source, summary.domains, effect_tokens)
        between, flows = between_of(record)
        data["generation"] = None if written is None else generation_of(written)
        data["text"] = text_of(record, excerpt_tokens)
        data["experts"] = _experts(record, summary, effects) | experts_of(record, flows)
        data["between"] = between | _measures(summary)
        if dial_tokens and source is not None:
            data["dial"] = dial_of(source, summary.domains, dial_tokens)
    if source is not None and source.run is not None:
        data["training"] = training_of(source, step)
    return {name: section for name, section in data.items() if section is not None}


def head_of(source: Source | None, step: int | None, record: RoutingRecord | None) -> dict[str, Any]:
    """Title, facts and outcome; router, k, experts, layers and whether lambda steers it, if there is a record."""
    about, run = record and record.about, source and source.run
    named = Path(record.name).stem if source is None else (run.path if run else source.checkpoint).resolve().name
    head: dict[str, Any] = {
        "title": short_name(named),
        "version": remoe.__version__,
        "facts": facts(source, about, step),
        "outcome": outcome(run, step),
        "router": about.router if about else source.model.config.router,
    }
    if about:
        head |= {"k": about.k, "experts": about.experts, "layers": about.layers, "steered": about.steered}
        head |= {"shared": about.shared_expert, "tokens": about.tokens}
    return head


def training_of(source: Source, step: int | None) -> dict[str, Any] | None:
    """The course of a run up to a step, see `course_of`; and controlled, whether lambda controls the sparsity."""
    c = source.model.config
    if isinstance(source.model, RelufiedMixin):
        experts, k, steered = c.relufied["num_experts"], c.relufied["k"], True
    else:
        experts, k, steered = c.experts_per_layer, c.active_per_token, c.steered
    course = course_of(training_records(source.run, step), experts, k, 1 - k / experts if steered else None)
    return course and course | {"controlled": source.model.sparsity.rule != "none"}


def _experts(record: RoutingRecord, summary: RoutingSummary, effects: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "share": summary.share_LE,
        "inactiveBelow": inactive_below(record.about.experts, record.about.k),
        "domains": [short_name(domain) for domain in summary.domains],
        "domainShare": summary.share_CLE,
        "top": [[[lines(token) for token in tokens] for tokens in experts] for experts in summary.top_tokens],
        "frequency": {
            "count": summary.count_U,
            "active": summary.active_U,
            "correlation": summary.figures.frequency_correlation,
        },
        "effect": effects,
    }


def _measures(summary: RoutingSummary) -> dict[str, Any]:
    figures = summary.figures
    return {
        "chunk": CHUNK,
        "sparsity": figures.sparsity_per_layer,
        "imbalance": figures.load_imbalance_per_layer,
        "specialisation": figures.specialisation_per_layer,
        "chunkSparsity": figures.chunk_sparsity_per_layer,
        "reuse": figures.expert_reuse_per_layer,
    }
