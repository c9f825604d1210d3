"""What a report is made of: texts with their routing, facts, and the records of training.

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
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.plan import parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GATE_DIGITS = 3
REPLACEMENT = "\ufffd"  # what a decoder has for bytes that are no character
CHARACTER_TOKENS = 8  # a character has four bytes at most
POINTS = 600


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a domain's validation text, and how it was routed.

    Attributes:
        domain: its name.
        tokens: the text, token by token.
        gates: of each layer and token the experts that it was given to: expert, gate, expert, gate, ... A gate that is
            not finite is None.
    """

    domain: str
    tokens: list[str]
    gates: list[list[list[float | None]]]


def experts_of(config: RemoeConfig) -> int:
    """Experts of a layer, each as narrow as the granularity makes it."""
    return config.num_experts * config.granularity


def wanted_of(config: RemoeConfig) -> int:
    """How many of them a token is wanted to have."""
    return config.num_experts_per_tok * config.granularity


def excerpts(trained: Trained, windows: ValidationWindows, length: int) -> list[Excerpt]:
    """The first `length` tokens of each domain, or as many as the domain or a window has."""
    found = []
    for domain in windows.domains:
        input_BS, _, mask_BS = next(windows.batches(domain, 1))
        input_BS, mask_BS = input_BS[:1, :length], mask_BS[:1, :length]
        # Both, because the gate of an executed pair may be rounded to zero, or be negative.
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
    """What each token adds to the text; a character of several tokens stands at the last of them."""
    texts: list[str] = []
    before, start = 0, 0  # a token is decoded behind the piece before it: some decoders drop what begins a text
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
    """What the model is and how it did, by name; `step` is that of a run's checkpoint."""
    c = trained.model.config
    found = {"router": c.router}
    if c.routes_pairs:
        found["experts"] = f"{experts_of(c)} in each layer ({c.num_hidden_layers}), {wanted_of(c)} wanted per token"
    if c.shared_expert_size:
        found["shared expert"] = f"width {c.shared_expert_size}, for every token"
    total, active = map(quantity, parameters(c))
    found["parameters"] = total if total == active else f"{total}, {active} of them for a token at the wanted sparsity"
    if trained.run is not None:
        config, summary = trained.run.load_config(), trained.run.load_summary()
        found["trained"] = f"{step:,} steps of {config.batch_size * config.seq_len:,} tokens"
        if summary.get("steps") == step:
            everything = summary["validation"]["all"]
            found["validation loss"] = f"{everything['loss']:.4f} nats per token"
            if c.routes_pairs:
                found["sparsity in validation"] = (
                    f"{everything['sparsity']:.4f}, wanted {1 - wanted_of(c) / experts_of(c):.4g}"
                )
    return found


def training_records(trained: Trained, step: int | None) -> list[dict]:
    """Those of the run's metrics.jsonl up to the checkpoint's step; none for a model in a folder of its own."""
    if trained.run is None or not trained.run.metrics.is_file():
        return []
    return [record for record in read_metrics(trained.run.metrics) if record["step"] <= step]


def thinned(records: list[dict]) -> list[dict]:
    """At most about 2 POINTS of them, evenly and, for logarithmic steps, by even ratios: a figure shows no more."""
    if len(records) <= 2 * POINTS:
        return records
    even = np.linspace(0, len(records) - 1, POINTS)
    ratio = np.geomspace(1, len(records), POINTS) - 1
    return [records[i] for i in np.unique(np.concatenate([even, ratio]).round().astype(int))]
