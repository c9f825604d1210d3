"""Data: from text to token shards (`prepare`), and from shards to batches (`open_dataset`).

Names load on first use, so that options and documents do not import torch or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remoe.lab.data.batches import TrainBatches, ValidationWindows
    from remoe.lab.data.dataset import Dataset, Split, open_dataset, spot_check, verify_hashes
    from remoe.lab.data.documents import TOTAL, Document
    from remoe.lab.data.mixture import MixedBatches, training_batches
    from remoe.lab.data.options import PrepareOptions
    from remoe.lab.data.preparation import prepare
    from remoe.lab.data.stream_batches import StreamBatches
    from remoe.lab.data.tokenizer import load_tokenizer, tokenizer_fingerprint

_HOMES = {
    "Dataset": "dataset",
    "Document": "documents",
    "MixedBatches": "mixture",
    "PrepareOptions": "options",
    "Split": "dataset",
    "StreamBatches": "stream_batches",
    "TOTAL": "documents",
    "TrainBatches": "batches",
    "ValidationWindows": "batches",
    "load_tokenizer": "tokenizer",
    "open_dataset": "dataset",
    "prepare": "preparation",
    "spot_check": "dataset",
    "tokenizer_fingerprint": "tokenizer",
    "training_batches": "mixture",
    "verify_hashes": "dataset",
}

__all__ = [
    "TOTAL",
    "Dataset",
    "Document",
    "MixedBatches",
    "PrepareOptions",
    "Split",
    "StreamBatches",
    "TrainBatches",
    "ValidationWindows",
    "load_tokenizer",
    "open_dataset",
    "prepare",
    "spot_check",
    "tokenizer_fingerprint",
    "training_batches",
    "verify_hashes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
