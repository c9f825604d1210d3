"""Contents of a report: texts with their routing, facts, and the records of training.

Legend: L layers, T tokens, E experts.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from remoe.lab.analysis.record import UNKNOWN, About, RoutingRecord
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.style import quantity
from remoe.lab.text import short_name
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.metrics import read_metrics
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.plan import parameters

GATE_DIGITS = 3
EXCERPT_ROWS = 4096  # read at a time
POINTS = 600


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a domain's validation text, and how it was routed.

    Attributes:
        domain: name of the domain.
        tokens: the text, token by token.
        gates: for each layer and token, its experts and their gates: expert, gate, expert, gate, ... A gate that is not
            finite is None, and one that the record does not have is 1.
    """

    domain: str
    tokens: list[str]
    gates: list[list[list[float | None]]]


def excerpts(record: RoutingRecord, length: int) -> list[Excerpt]:
    """The first `length` tokens of each domain, or fewer if the domain or its first sequence is shorter."""
    found: dict[int, Excerpt] = {}
    for block in record.blocks(gates=True, texts=True, rows=EXCERPT_ROWS):
        for domain in block.domain_T.unique().tolist():
            if domain in found:
                continue
            in_domain_T = block.domain_T == domain
            first = block.sequence_T[in_domain_T][0]
            rows = (in_domain_T & (block.sequence_T == first)).nonzero().flatten()[:length]
            active_LTE = block.active_LTE[:, rows]
            gate_LTE = active_LTE.float() if block.gate_LTE is None else block.gate_LTE[:, rows]
            gates = [
                [_pairs(*token) for token in zip(active_TE, gate_TE, strict=True)]
                for active_TE, gate_TE in zip(active_LTE, gate_LTE, strict=True)
            ]
            texts = [_shown((block.texts or [])[row], int(block.token_T[row])) for row in rows.tolist()]
            found[domain] = Excerpt(record.about.domains[domain], texts, gates)
        if len(found) == len(record.about.domains):
            break
    return [found[domain] for domain in sorted(found)]


def _shown(text: str | None, token: int) -> str:
    """A token's text; its id, or a dot, where the record does not have it."""
    if text is not None:
        return text
    return "· " if token == UNKNOWN else f"[{token}] "


def _pairs(active_E: Tensor, gate_E: Tensor) -> list[float | None]:
    return [number for e in active_E.nonzero().flatten().tolist() for number in (e, _short(gate_E[e].item()))]


def _short(gate: float) -> float | None:
    return float(f"{gate:.{GATE_DIGITS}g}") if math.isfinite(gate) else None


def facts(source: Source | None, about: About | None, step: int | None) -> dict[str, str]:
    """Facts about the model and its training, by name; `step` is the step of a run's checkpoint."""
    found = {}
    if about is not None:
        found["router"] = about.router
        found["experts"] = f"{about.layers} layers of {about.experts}; target: {about.k} per token"
    if source is None:
        if path := about.model.get("path"):
            found["model"] = short_name(str(path))
        return found
    c = source.model.config
    if not isinstance(source.model, RemoeForCausalLM):
        found["model"] = type(source.model).__name__
        found["parameters"] = quantity(sum(parameter.numel() for parameter in source.model.parameters()))
        return found
    found.setdefault("router", c.router)
    if c.shared_expert_size:
        found["shared expert"] = f"width {c.shared_expert_size}, used by every token"
    total, active = map(quantity, parameters(c))
    found["parameters"] = (
        total if total == active else f"{total}, of which a token uses {active} at the target sparsity"
    )
    return found | _trained(source, step)


def _trained(source: Source, step: int | None) -> dict[str, str]:
    if source.run is None:
        return {}
    c, config, summary = source.model.config, source.run.load_config(), source.run.load_summary()
    found = {"trained": f"{step:,} steps of {config.batch_size * config.seq_len:,} tokens"}
    if summary.get("steps") == step:
        everything = summary["validation"]["all"]
        found["validation loss"] = f"{everything['loss']:.4f} nats per token"
        if c.routes_pairs:
            found["validation sparsity"] = (
                f"{everything['sparsity']:.4f} (target: {1 - c.active_per_token / c.experts_per_layer:.4g})"
            )
    return found


def outcome(run: RunFolder | None, step: int | None) -> list[str]:
    """Sentences of the run's summary on how it went; none for another checkpoint than the last, and from 0.1.0."""
    summary = run.load_summary() if run else {}
    said = summary.get("outcome") if summary.get("steps") == step else None
    return [sentence for sentence in said if isinstance(sentence, str)] if isinstance(said, list) else []


def training_records(run: RunFolder | None, step: int | None) -> list[dict]:
    """Records of the run's metrics.jsonl up to the checkpoint's step; none for a model that is not part of a run."""
    if run is None or not run.metrics.is_file():
        return []
    return [record for record in read_metrics(run.metrics) if record["step"] <= step]


def thinned(records: list[dict]) -> list[dict]:
    """At most about 2 POINTS records, spaced evenly and, for log scales, geometrically: a figure shows no more."""
    if len(records) <= 2 * POINTS:
        return records
    even = np.linspace(0, len(records) - 1, POINTS)
    ratio = np.geomspace(1, len(records), POINTS) - 1
    return [records[i] for i in np.unique(np.concatenate([even, ratio]).round().astype(int))]
