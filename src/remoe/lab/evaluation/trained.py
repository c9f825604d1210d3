"""Evaluation of a trained model: that of a run, finished or not, or one in a folder of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from remoe.convert.relufy.model import RelufiedMixin
from remoe.errors import CheckpointError
from remoe.lab.data import TOTAL, Dataset, ValidationWindows, open_dataset
from remoe.lab.machine import keep_freed_memory, pick_device
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.load import load_model
from remoe.lab.training.validate import evaluate, total
from remoe.models.context import longest_sequence
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.quantization import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_WINDOW = 2048


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
    """Evaluates a run's newest checkpoint, a given checkpoint, or a model in a folder of its own.

    Args:
        path: a run's folder, one of its checkpoints, or the folder of a saved or exported model of this package, or
            of a relufied one.
        data: prepared data; None for the data that the run was trained on.
        split: "validation" or "train".
        max_tokens: in total, divided among the domains in proportion to their size; None for all.
        batch_size: sequences per forward pass.
        max_experts: the most experts that a token may use; None for no limit.
        scheme: as in `remoe.quantize`; None to leave the weights as they are.

    Returns:
        Checkpoint, data folder, and the figures by domain, "all" last.

    Raises:
        CheckpointError: when there is no usable model, or no data is given or known.
        DataError: when the data was prepared with another tokenizer.
        ConfigError: for a limit on a model whose tokens are not routed.
    """
    trained = open_trained(path, data, scheme)
    model, windows = trained.model, trained.windows(split)
    if max_experts is not None:
        model.set_max_experts(max_experts)
    results = evaluate(model, windows, batch_size=batch_size, max_tokens=max_tokens, document_end=trained.document_end)
    rows = {domain: result.to_dict() for domain, result in results.items()}
    return trained.checkpoint, trained.dataset.path, rows | {TOTAL: total(results).to_dict()}


@dataclass(frozen=True)
class Trained:
    """A trained model, and the data to evaluate it on.

    Attributes:
        model: in evaluation mode, on the device that "auto" stands for.
        tokenizer: its own.
        checkpoint: the folder of its weights.
        dataset: prepared with that tokenizer.
        run: the run that trained it; None for a model in a folder of its own.
    """

    model: RemoeForCausalLM | RelufiedMixin
    tokenizer: "PreTrainedTokenizerBase"
    checkpoint: Path
    dataset: Dataset
    run: RunFolder | None

    @property
    def document_end(self) -> int | None:
        """The token that ends a document, where the run masked the documents of a sequence; None otherwise."""
        masks = self.run is not None and self.run.load_config().mask_documents
        return self.dataset.eos_token_id if masks else None

    def windows(self, split: str) -> ValidationWindows:
        """Sequences of the data as long as in the run's training; for a model without a run at most LONGEST_WINDOW."""
        longest = min(longest_sequence(self.model) or LONGEST_WINDOW, LONGEST_WINDOW)
        return ValidationWindows(getattr(self.dataset, split), self.run.load_config().seq_len if self.run else longest)


def open_trained(path: str, data: str | None, scheme: str | None = None) -> Trained:
    """Loads a run's newest checkpoint, a given one, or a model in a folder of its own; arguments as of `evaluate_run`.

    Raises:
        CheckpointError, DataError: as `evaluate_run`.
    """
    keep_freed_memory()
    model, tokenizer, checkpoint = load_model(path)
    if not isinstance(model, RemoeForCausalLM | RelufiedMixin):
        raise CheckpointError(
            f"{path} is a {type(model).__name__}, not a model of this package: it can only be evaluated with --tasks"
        )
    model.to(pick_device("auto"))
    if scheme is not None:
        quantize(model, scheme)
    run = run_of(checkpoint)
    folder = data or (run and run.load_config().data)
    if folder is None:
        raise CheckpointError(f"{path} does not say on which data it was trained; name a folder with --data")
    dataset = open_dataset(folder, tokenizer=run.tokenizer if run else path)
    dataset.check_tokenizer(tokenizer, path)
    return Trained(model, tokenizer, checkpoint, dataset, run)
