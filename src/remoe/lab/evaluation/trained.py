"""Evaluation of a trained model: a run's, finished or not, or one in a folder of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from remoe.errors import CheckpointError, ConfigError
from remoe.lab.analysis.collect import gates_of
from remoe.lab.data import TOTAL, Dataset, ValidationWindows, open_dataset
from remoe.lab.training.folder import RunFolder, load_model, run_of
from remoe.lab.training.memory import keep_freed_memory
from remoe.lab.training.trainer import pick_device
from remoe.lab.training.validate import evaluate, total
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.quantization import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILE_VALUES = 1_000_000  # torch's quantile takes no more than 16 million
LONGEST_WINDOW = 2048
# Shares of the active pairs that the default thresholds of a sweep leave out.
SWEPT_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class SweepPoint:
    """What a gate threshold costs and gives.

    Attributes:
        threshold: pairs whose gate is at most this were left out.
        loss: nats per token.
        active_experts: executed pairs per token and layer.
        tokens_per_second: of the whole evaluation.
    """

    threshold: float
    loss: float
    active_experts: float
    tokens_per_second: float


def evaluate_run(
    path: str,
    data: str | None,
    *,
    split: str,
    max_tokens: int | None,
    batch_size: int,
    max_experts: int | None = None,
    scheme: str | None = None,
) -> tuple[Path, Path, dict[str, dict[str, float]]]:
    """Figures of a run's newest checkpoint, of a given one, or of a model in a folder of its own.

    Args:
        path: a run's folder, one of its checkpoints, or the folder of a saved or exported model of ours.
        data: prepared data; None for the data that the run was trained with.
        split: "validation" or "train".
        max_tokens: in all, shared out over the domains by size; None for all.
        batch_size: sequences per forward pass.
        max_experts: cap on a token's experts; None for none.
        scheme: of `remoe.quantize`; None to leave the weights as they are.

    Returns:
        Checkpoint, data folder, and figures by domain, "all" last.

    Raises:
        CheckpointError: when there is no usable model, or its data is not known.
        DataError: when the data was made with another tokenizer.
        ConfigError: for a cap on a model whose tokens are not routed.
    """
    trained = open_trained(path, data, scheme)
    model, windows = trained.model, trained.windows(split)
    if max_experts is not None:
        model.set_max_experts(max_experts)
    results = evaluate(model, windows, batch_size=batch_size, max_tokens=max_tokens)
    rows = {domain: result.to_dict() for domain, result in results.items()}
    return trained.checkpoint, trained.dataset.path, rows | {TOTAL: total(results).to_dict()}


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
    """Loss and speed of a run under several gate thresholds.

    Args:
        thresholds: None for 0 and those that leave out a tenth to nine tenths of the pairs of some tokens.
        path, data, split, max_tokens, batch_size, max_experts, scheme: as in `evaluate_run`.

    Returns:
        Checkpoint, data folder, and a point for each threshold.

    Raises:
        CheckpointError, DataError, ConfigError: as `evaluate_run`.
    """
    trained = open_trained(path, data, scheme)
    model, windows = trained.model, trained.windows(split)
    model.set_max_experts(max_experts)
    gate_P = _active_gates(model, windows, batch_size)  # and the machine is warm
    if thresholds is None:
        if len(gate_P) == 0:
            raise ConfigError(f"{path}: no expert is on for any token looked at: no threshold leaves anything out")
        thresholds = [0.0, *(gate_P.quantile(share).item() for share in SWEPT_SHARES)]
    experts = model.config.num_experts * model.config.granularity
    points = []
    for threshold in thresholds:
        model.set_gate_threshold(threshold)
        start = time.perf_counter()
        result = total(evaluate(model, windows, batch_size=batch_size, max_tokens=max_tokens))
        speed = result.targets / (time.perf_counter() - start)
        points.append(SweepPoint(threshold, result.loss, (1 - result.sparsity) * experts, speed))
    return trained.checkpoint, trained.dataset.path, points


@dataclass(frozen=True)
class Trained:
    """A trained model and the data that it is looked at with.

    Attributes:
        model: in eval mode, on the device that "auto" means.
        tokenizer: its own.
        checkpoint: where its weights lie.
        dataset: prepared with that tokenizer.
        run: that it is of; None for a model in a folder of its own.
    """

    model: RemoeForCausalLM
    tokenizer: "PreTrainedTokenizerBase"
    checkpoint: Path
    dataset: Dataset
    run: RunFolder | None

    def windows(self, split: str) -> ValidationWindows:
        """Sequences of the data, as long as those of the run's training; of another model at most LONGEST_WINDOW."""
        length = self.model.config.max_position_embeddings
        return ValidationWindows(getattr(self.dataset, split), length if self.run else min(length, LONGEST_WINDOW))


def open_trained(path: str, data: str | None, scheme: str | None = None) -> Trained:
    """A run's newest checkpoint, a given one, or a model in a folder of its own; arguments as of `evaluate_run`.

    Raises:
        CheckpointError, DataError: as `evaluate_run`.
    """
    keep_freed_memory()
    model, tokenizer, checkpoint = load_model(path)
    if not isinstance(model, RemoeForCausalLM):
        raise CheckpointError(
            f"{path} is a {type(model).__name__}, and not a model of ours: only remoe eval --tasks takes it"
        )
    model.to(pick_device("auto"))
    if scheme is not None:
        quantize(model, scheme)
    run = run_of(checkpoint)
    folder = data or (run and run.load_config().data)
    if folder is None:
        raise CheckpointError(f"{path} names no data; give --data")
    dataset = open_dataset(Path(folder))
    dataset.check_tokenizer(tokenizer, path)
    return Trained(model, tokenizer, checkpoint, dataset, run)


def _active_gates(model: RemoeForCausalLM, windows: ValidationWindows, batch_size: int) -> Tensor:
    """(P,) float32: the sizes of the gates of a batch's active pairs over all layers, at most a million of them."""
    input_NS, _, mask_NS = next(windows.batches(windows.domains[0], batch_size))
    gate_P = gates_of(model, input_NS, mask_NS).flatten().abs()  # a learned scale may be negative
    gate_P = gate_P[gate_P > 0]
    return gate_P[:: len(gate_P) // QUANTILE_VALUES + 1]
