"""A trained model and the text that its routing is recorded on, as commands name the two."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from remoe.errors import CheckpointError
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.texts import PreparedText, Prompt, RawText, Text, TokenTexts
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.data.documents import Columns
from remoe.lab.data.sources import is_raw, resolve_source
from remoe.lab.evaluation.trained import LONGEST_WINDOW
from remoe.lab.generation import check_prompt
from remoe.lab.machine import keep_freed_memory, pick_device
from remoe.lab.training.checkpoint import sha256
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.load import load_model
from remoe.lab.training.shards import model_files
from remoe.models.context import longest_sequence
from remoe.models.modeling_remoe import RemoeForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """A model and what it reads.

    Attributes:
        model: in evaluation mode, on the device that "auto" stands for.
        mixture: the same, to read its routing; None for one of this package that routes no pairs.
        tokenizer: its own.
        checkpoint: the folder of its weights.
        run: the run that trained it; None for a model in a folder of its own.
        text: what it reads.
        document_end: the token that ends a document, if the run masked the documents of a sequence from each other.
    """

    model: "PreTrainedModel"
    mixture: Mixture | None
    tokenizer: "PreTrainedTokenizerBase"
    checkpoint: Path
    run: RunFolder | None
    text: Text
    document_end: int | None

    def record(self, sink: Path | BinaryIO) -> RoutingRecord:
        """Records the routing of the text."""
        assert self.mixture is not None
        texts, identity = TokenTexts(self.tokenizer), self.identity()
        return record_routing(
            self.mixture, self.text, sink, texts=texts, model=identity, document_end=self.document_end
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the model: its path, class, type and a hash of its weights."""
        weights = model_files(self.checkpoint)
        digest = hashlib.sha256("".join(map(sha256, weights)).encode())
        config = self.model.config
        return {
            "path": str(self.checkpoint),
            "class": type(self.model).__name__,
            "model_type": config.model_type,
            "weights_sha256": digest.hexdigest() if weights else None,
        }


def open_source(
    path: str, data: str | None = None, prompt: str | None = None, *, split: str = "validation", max_tokens: int | None
) -> Source:
    """Loads a model, and finds its text.

    Args:
        path: a run's folder, one of its checkpoints, or the folder of any model that transformers loads.
        data: folder of prepared data, or raw text as `remoe data prepare` takes it; None for the data that the run was
            trained on.
        prompt: text to read instead.
        split: of prepared data, "validation" or "train".
        max_tokens: approximate number of tokens; None for all.

    Raises:
        CheckpointError: if there is no usable model, or its data is unknown.
        ConfigError: for a model that is no mixture whose routing can be read, and a prompt that is not valid.
        DataError: if the data was made with another tokenizer or cannot be read.
    """
    if prompt is not None:
        check_prompt(prompt)
    keep_freed_memory()
    model, tokenizer, checkpoint = load_model(path)
    model.to(pick_device("auto"))
    ours, run = isinstance(model, RemoeForCausalLM), run_of(checkpoint)
    config = run and run.load_config()
    mixture = Mixture(model) if not ours or model.config.routes_pairs else None
    longest = longest_sequence(model) or LONGEST_WINDOW
    length = config.seq_len if config else min(longest, LONGEST_WINDOW)
    data, document_end = data or (config and config.data), tokenizer.eos_token_id
    if prompt is not None:
        text: Text = Prompt(prompt, tokenizer, longest, special=not ours)
    elif data is None:
        raise CheckpointError(f"{path} does not say on which data it was trained; name a folder with --data")
    elif is_raw(data):
        text = RawText(resolve_source(data, Columns()).documents, tokenizer, length, max_tokens, data)
    else:
        dataset = open_dataset(data, tokenizer=run.tokenizer if run else path)
        dataset.check_tokenizer(tokenizer, path)
        windows = ValidationWindows(getattr(dataset, split), length)
        text, document_end = PreparedText(windows, max_tokens, dataset.fingerprint), dataset.eos_token_id
    masked = config is not None and config.mask_documents
    return Source(model, mixture, tokenizer, checkpoint, run, text, document_end if masked else None)
