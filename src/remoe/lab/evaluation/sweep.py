"""The trade-off between loss and speed when a trained model leaves out experts with small gates.

Legend: P pairs, N sequences, S sequence length, L layers, T tokens, E experts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from remoe.errors import ConfigError
from remoe.lab.analysis.collect import gates_of
from remoe.lab.data import ValidationWindows
from remoe.lab.evaluation.trained import open_trained
from remoe.lab.training.validate import evaluate, total

QUANTILE_VALUES = 1_000_000  # torch's quantile takes no more than 16 million
# Shares of the active pairs that the default thresholds leave out.
SWEPT_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class SweepPoint:
    """Loss and speed at one gate threshold.

    Attributes:
        threshold: pairs with a gate of at most this were not executed.
        loss: nats per token.
        active_experts: executed pairs per token and layer.
        tokens_per_second: of the whole evaluation.
    """

    threshold: float
    loss: float
    active_experts: float
    tokens_per_second: float


def sweep_run(
    path: str,
    data: str | None,
    thresholds: Sequence[float] | None,
    *,
    split: str,
    max_tokens: int | None,
    batch_size: int,
    max_experts: int | None = None,
    scheme: str | None = None,
) -> tuple[Path, Path, list[SweepPoint]]:
    """Evaluates a model at several gate thresholds.

    Args:
        thresholds: None for 0 and those that leave out SWEPT_SHARES of the active pairs of a batch.
        path, data, split, max_tokens, batch_size, max_experts, scheme: as in `evaluate_run`.

    Returns:
        Checkpoint, data folder, and a point for each threshold.

    Raises:
        CheckpointError, DataError, ConfigError: as `evaluate_run`.
    """
    trained = open_trained(path, data, scheme)
    model, windows = trained.model, trained.windows(split)
    model.set_max_experts(max_experts)
    experts, gate_P = _active_gates(model, windows, batch_size)  # which warms the machine up as well
    if thresholds is None:
        if len(gate_P) == 0:
            raise ConfigError(f"{path}: no expert is active for any token of the sample: thresholds change nothing")
        thresholds = [0.0, *(gate_P.quantile(share).item() for share in SWEPT_SHARES)]
    points = []
    for threshold in thresholds:
        model.set_gate_threshold(threshold)
        start = time.perf_counter()
        options = {"batch_size": batch_size, "max_tokens": max_tokens, "document_end": trained.document_end}
        result = total(evaluate(model, windows, **options))
        speed = result.targets / (time.perf_counter() - start)
        points.append(SweepPoint(threshold, result.loss, (1 - result.sparsity) * experts, speed))
    return trained.checkpoint, trained.dataset.path, points


def _active_gates(model: PreTrainedModel, windows: ValidationWindows, batch_size: int) -> tuple[int, Tensor]:
    """E; and (P,) float32: the absolute gates of a batch's active pairs over all layers, at most a million of them."""
    input_NS, _, mask_NS = next(windows.batches(windows.domains[0], batch_size))
    gate_LTE = gates_of(model, input_NS, mask_NS).abs()  # a learned scale can be negative
    gate_P = gate_LTE[gate_LTE > 0]
    return gate_LTE.shape[-1], gate_P[:: len(gate_P) // QUANTILE_VALUES + 1]
