"""The trade-off between loss and speed of a trained model, measured: a gate threshold, and a cap on a token's experts.

Legend: T tokens, E experts, P pairs.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from remoe.errors import check
from remoe.lab.analysis.effect import first_batches
from remoe.lab.analysis.recording import batch_rows, routing_of_batch
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.texts import Batch
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating
from remoe.models.packing import document_positions

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the active pairs, which the measured thresholds leave out
QUANTILE_VALUES = 1_000_000  # torch's quantile takes no more than 16 million
ROUNDS = 3  # of all settings in turn; the middle speed of each counts


@dataclass(frozen=True)
class DialPoint:
    """One setting and what came out.

    Attributes:
        setting: gate threshold, or cap.
        loss: nats per token.
        active: executed pairs per token and layer.
        tokens_per_second: of a forward pass in batches, with the logits.
    """

    setting: float
    loss: float
    active: float
    tokens_per_second: float


@dataclass(frozen=True)
class Dial:
    """Settings of a trained model.

    Attributes:
        tokens: that were read at each setting.
        threshold: the first, at 0, is the model as it was trained.
        cap: the last, at the most experts that a token has, is the model as it was trained.
    """

    tokens: int
    threshold: list[DialPoint]
    cap: list[DialPoint]


def measure_dial(source: Source, domains: Sequence[str], max_tokens: int) -> Dial:
    """Measures loss and speed at several gate thresholds and caps.

    Args:
        source: a model of ours, and its text.
        domains: of the text; each gives its first sequences.
        max_tokens: of all domains together, divided equally; at least one sequence of each is read.

    Raises:
        ConfigError: for a model of another type, or a text without a token whose loss is known.
    """
    mixture, model = source.mixture, source.model
    check(isinstance(model, RemoeForCausalLM), "gate threshold and cap need a model of remoe's own type")
    share = max_tokens // len(domains)
    rows = max(1, min(batch_rows(mixture, source.text.seq_len), share // source.text.seq_len))
    batches = first_batches(source.text, rows, domains, share)
    with evaluating(model), _restored(model):
        loss, active, gates, counts = _read(source, batches)
        shares = torch.tensor(SHARES, dtype=gates.dtype)
        thresholds = [0.0, *gates.quantile(shares).unique().tolist()] if len(gates) else [0.0]
        most = max(1, int(counts.max()))
        caps = sorted({2**i for i in range(most.bit_length()) if 2**i < most} | {min(mixture.k, most), most})
        settings = [(threshold, None) for threshold in thresholds] + [(0.0, cap) for cap in caps if cap < most]
        found = {(0.0, None): (loss, active)}
        for setting in settings[1:]:
            _set(model, *setting)
            found[setting] = _read(source, batches)[:2]
        speeds = _speeds(source, batches, settings)
    points = {setting: (*found[setting], speeds[setting]) for setting in settings}
    return Dial(
        sum(int(batch.mask_NS.sum()) for batch in batches),
        [DialPoint(threshold, *points[threshold, None]) for threshold in thresholds],
        [DialPoint(cap, *points[0.0, cap if cap < most else None]) for cap in caps],
    )


def _read(source: Source, batches: Sequence[Batch]) -> tuple[float, float, Tensor, Tensor]:
    """Loss, executed pairs per token and layer, sizes (P,) of their gates, and (T,) the most experts of each token."""
    nats, gates, counts, pairs = [], [], [], 0
    for batch in batches:
        loss_T, active_LTE, gate_LTE = routing_of_batch(source.mixture, batch, document_end=source.document_end)
        nats.append(loss_T)
        for active_TE, gate_TE in zip(active_LTE, gate_LTE, strict=True):
            gates.append(gate_TE[active_TE].abs())  # a learned scale can be negative
            counts.append(active_TE.sum(dim=1))
            pairs += int(counts[-1].sum())
    known_T = torch.cat(nats)[~torch.cat(nats).isnan()]
    check(len(known_T) > 0, "the dial needs a text of two tokens or more")
    count_T, gate_P = torch.cat(counts), torch.cat(gates)
    return known_T.double().mean().item(), pairs / len(count_T), gate_P[:: len(gate_P) // QUANTILE_VALUES + 1], count_T


def _speeds(source: Source, batches: Sequence[Batch], settings: Sequence[tuple]) -> dict[tuple, float]:
    """Tokens per second at each setting; in turn, so that what else the machine does befalls all alike."""
    tokens = sum(int(batch.mask_NS.sum()) for batch in batches)
    seconds: dict[tuple, list[float]] = {setting: [] for setting in settings}
    for _ in range(ROUNDS):
        for setting in settings:
            _set(source.model, *setting)
            _wait(source.model)
            start = time.perf_counter()
            for batch in batches:
                _forward(source, batch)
            _wait(source.model)
            seconds[setting].append(time.perf_counter() - start)
    return {setting: tokens / median(taken) for setting, taken in seconds.items()}


def _forward(source: Source, batch: Batch) -> None:
    device, options = source.model.device, {}
    if source.document_end is not None:
        options["position_ids"] = document_positions(batch.input_NS, source.document_end).to(device)
    mask_NS = batch.mask_NS.to(device)
    source.model(batch.input_NS.to(device), attention_mask=mask_NS, use_cache=False, **options)


def _wait(model: RemoeForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _set(model: RemoeForCausalLM, threshold: float, cap: int | None) -> None:
    model.set_gate_threshold(threshold)
    model.set_max_experts(cap)


@contextmanager
def _restored(model: RemoeForCausalLM) -> Iterator[None]:
    """Context that begins with the model as it was trained, and ends with its present threshold and cap."""
    before = [(layer.mlp, layer.mlp.gate_threshold, layer.mlp.max_experts) for layer in model.model.layers]
    _set(model, 0.0, None)
    try:
        yield
    finally:
        for moe, threshold, cap in before:
            moe.gate_threshold, moe.max_experts = threshold, cap
