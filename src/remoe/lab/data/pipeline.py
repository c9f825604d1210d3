"""The reading and encoding pipeline: each stage runs in a thread of its own, a few batches ahead."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from remoe.lab.data.documents import Document

ItemT = TypeVar("ItemT")
BATCH_CHARACTERS = 1_000_000  # enough documents to keep all cores of the tokenizer busy
AHEAD = 3  # batches that wait between two stages
_POLL_SECONDS = 0.1


def prefetch(items: Iterable[ItemT], ahead: int = AHEAD) -> Iterator[ItemT]:
    """Yield `items`, computed in a thread up to `ahead` of the reader; errors are raised in the reader."""
    waiting: queue.Queue[tuple[bool, ItemT | BaseException | None]] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(entry: tuple[bool, ItemT | BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = waiting.get()
            if not is_item:
                if value is not None:
                    raise value
                return
            yield value
    finally:
        stopped.set()
        thread.join()


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Gather documents into lists of about BATCH_CHARACTERS characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(
    documents: Iterable[Document],
    encode: Callable[[list[str]], list[list[int]]],
    eos_id: int,
    dtype: np.dtype,
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield each document with its tokens, EOS token last, as `dtype` (S); order is kept."""
    batches = prefetch(batch_documents(documents))
    encoded = prefetch((batch, encode([item.text for item in batch])) for batch in batches)
    for batch, ids in encoded:
        for document, tokens in zip(batch, ids, strict=True):
            tokens_S = np.empty(len(tokens) + 1, dtype)
            tokens_S[:-1] = tokens
            tokens_S[-1] = eos_id
            yield document, tokens_S
