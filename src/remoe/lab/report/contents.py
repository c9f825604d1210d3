"""Contents of a report: texts with their routing, facts, and the records of training.

Legend: L layers, T tokens, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remoe.lab.analysis.collect import active_of, gates_of
from remoe.lab.analysis.style import quantity
from remoe.lab.data import ValidationWindows
from remoe.lab.evaluation.trained import Trained
from remoe.lab.training.metrics import read_metrics
from remoe.models.plan import parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GATE_DIGITS = 3
REPLACEMENT = "\ufffd"  # decoded from bytes that are not a character
CHARACTER_TOKENS = 8  # more than enough for a character, which has at most four bytes
POINTS = 600


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a domain's validation text, and how it was routed.

    Attributes:
        domain: name of the domain.
        tokens: the text, token by token.
        gates: for each layer and token, its experts and their gates: expert, gate, expert, gate, ... A gate that is not
            finite is None.
    """

    domain: str
    tokens: list[str]
    gates: list[list[list[float | None]]]


def excerpts(trained: Trained, windows: ValidationWindows, length: int) -> list[Excerpt]:
    """The first `length` tokens of each domain, or fewer if the domain or a window is shorter."""
    found = []
    for domain in windows.domains:
        input_BS, _, mask_BS = next(windows.batches(domain, 1))
        input_BS, mask_BS = input_BS[:1, :length], mask_BS[:1, :length]
        # Needs both, because the gate of an executed pair may be rounded to zero, or be negative.
        active_LTE = active_of(trained.model, input_BS, mask_BS)
        gate_LTE = gates_of(trained.model, input_BS, mask_BS)
        gates = [
            [
                [
                    number
                    for expert in active_E.nonzero().flatten().tolist()
                    for number in (expert, _short(gate_E[expert]))
                ]
                for active_E, gate_E in zip(active_TE, gate_TE, strict=True)
            ]
            for active_TE, gate_TE in zip(active_LTE, gate_LTE, strict=True)
        ]
        found.append(Excerpt(domain, texts_of(trained.tokenizer, input_BS[mask_BS].tolist()), gates))
    return found


def _short(gate: float) -> float | None:
    return float(f"{gate:.{GATE_DIGITS}g}") if math.isfinite(gate) else None


def texts_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character that takes several tokens is with the last of them."""
    texts: list[str] = []
    # Each token is decoded after the piece before it, because some decoders drop a space at the start of a text.
    before, start = 0, 0
    for end in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:start])
        text = tokenizer.decode(ids[before:end])[len(known) :]
        if text.endswith(REPLACEMENT) and end < len(ids) and end - start < CHARACTER_TOKENS:
            texts.append("")
            continue
        texts.append(text)
        before, start = start, end
    return texts


def facts(trained: Trained, step: int | None) -> dict[str, str]:
    """Facts about the model and its training, by name; `step` is the step of a run's checkpoint."""
    c = trained.model.config
    found = {"router": c.router}
    if c.routes_pairs:
        found["experts"] = (
            f"{c.num_hidden_layers} layers of {c.experts_per_layer}; target: {c.active_per_token} per token"
        )
    if c.shared_expert_size:
        found["shared expert"] = f"width {c.shared_expert_size}, used by every token"
    total, active = map(quantity, parameters(c))
    found["parameters"] = (
        total if total == active else f"{total}, of which a token uses {active} at the target sparsity"
    )
    if trained.run is not None:
        config, summary = trained.run.load_config(), trained.run.load_summary()
        found["trained"] = f"{step:,} steps of {config.batch_size * config.seq_len:,} tokens"
        if summary.get("steps") == step:
            everything = summary["validation"]["all"]
            found["validation loss"] = f"{everything['loss']:.4f} nats per token"
            if c.routes_pairs:
                found["validation sparsity"] = (
                    f"{everything['sparsity']:.4f} (target: {1 - c.active_per_token / c.experts_per_layer:.4g})"
                )
    return found


def outcome(trained: Trained, step: int | None) -> list[str]:
    """Sentences of the run's summary on how it went; none for another checkpoint than the last, and from 0.1.0."""
    summary = trained.run.load_summary() if trained.run else {}
    said = summary.get("outcome") if summary.get("steps") == step else None
    return [sentence for sentence in said if isinstance(sentence, str)] if isinstance(said, list) else []


def training_records(trained: Trained, step: int | None) -> list[dict]:
    """Records of the run's metrics.jsonl up to the checkpoint's step; none for a model that is not part of a run."""
    if trained.run is None or not trained.run.metrics.is_file():
        return []
    return [record for record in read_metrics(trained.run.metrics) if record["step"] <= step]


def thinned(records: list[dict]) -> list[dict]:
    """At most about 2 POINTS records, spaced evenly and, for log scales, geometrically: a figure shows no more."""
    if len(records) <= 2 * POINTS:
        return records
    even = np.linspace(0, len(records) - 1, POINTS)
    ratio = np.geomspace(1, len(records), POINTS) - 1
    return [records[i] for i in np.unique(np.concatenate([even, ratio]).round().astype(int))]
