"""From documents to shards: reading and encoding in threads, and writing whole documents in order."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import save_file

from remoe.lab.data.documents import Document
from remoe.lab.data.manifest import (
    METADATA_KEY,
    TARGETS,
    Counts,
    ShardHeader,
    ShardRecord,
    SplitName,
    array_sha256,
    shard_name,
)
from remoe.lab.files import replacing

ItemT = TypeVar("ItemT")
BATCH_CHARACTERS = 1_000_000  # enough documents to keep all cores of the tokenizer busy
AHEAD = 3  # batches queued between two stages
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
    encode: Callable[[list[str]], list[Sequence[int]]],
    eos_id: int,
    dtype: np.dtype,
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield each document, in order, with its tokens and the EOS token as an array (S) of `dtype`.

    Reading and encoding each run in a thread of their own, a few batches ahead.
    """
    batches = prefetch(batch_documents(documents))
    encoded = prefetch((batch, encode([item.text for item in batch])) for batch in batches)
    for batch, ids in encoded:
        for document, tokens in zip(batch, ids, strict=True):
            tokens_S = np.empty(len(tokens) + 1, dtype)
            tokens_S[:-1] = tokens
            tokens_S[-1] = eos_id
            yield document, tokens_S


class ShardWriter:
    """Collects the documents of one split, and writes a shard whenever the next one would make it too large.

    `finished` is called with the record of each shard once the shard is safely on disk; only then does the
    next one begin.
    """

    def __init__(
        self,
        folder: Path,
        split: SplitName,
        *,
        domains: list[str],
        tokenizer_fingerprint: str,
        shard_tokens: int,
        first_index: int,
        finished: Callable[[ShardRecord], None],
    ) -> None:
        self.folder = folder
        self.split: SplitName = split
        self.domains = domains
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.shard_tokens = shard_tokens
        self.index = first_index
        self.finished = finished
        self._domain_index = {name: number for number, name in enumerate(domains)}
        self._clear()

    def add(self, tokens_S: np.ndarray, domain: str, num_bytes: int, targets_S: np.ndarray | None = None) -> None:
        """Add one document: its tokens including EOS, uint16 or uint32 (S), and its length in UTF-8 bytes.

        With `targets_S`, uint8 (S), only the tokens with 1 are targets of the loss: for all documents or none.
        """
        if self._tokens and self._count + len(tokens_S) > self.shard_tokens:
            self.flush()
        self._tokens.append(tokens_S)
        self._targets += [] if targets_S is None else [targets_S]
        self._count += len(tokens_S)
        self._domain.append(self._domain_index[domain])
        self._bytes.append(num_bytes)

    def flush(self) -> None:
        """Write the collected documents as a shard; raises DataError if the disk is full."""
        if not self._tokens:
            return
        lengths = np.array([len(part) for part in self._tokens], dtype=np.int64)
        arrays = {
            "tokens": np.concatenate(self._tokens),
            "document_offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            "document_domain": np.array(self._domain, dtype=np.int32),
            "document_bytes": np.array(self._bytes, dtype=np.int64),
        }
        if self._targets:
            arrays[TARGETS] = np.concatenate(self._targets)
        tokens, *index = arrays.values()
        header = ShardHeader(
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            split=self.split,
            index=self.index,
            sha256=array_sha256(tokens),
            index_sha256=array_sha256(*index),
        )
        path = self.folder / shard_name(self.split, self.index)
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata={METADATA_KEY: header.to_json()})
        record = self._record(header, arrays["document_domain"], lengths, arrays["document_bytes"])
        self.index += 1
        self._clear()
        self.finished(record)

    def _record(
        self, header: ShardHeader, domain_N: np.ndarray, lengths_N: np.ndarray, bytes_N: np.ndarray
    ) -> ShardRecord:
        domains: dict[str, Counts] = {}
        for number in np.unique(domain_N).tolist():
            chosen_N = domain_N == number
            domains[self.domains[number]] = Counts(
                documents=int(chosen_N.sum()),
                tokens=int(lengths_N[chosen_N].sum()),
                bytes=int(bytes_N[chosen_N].sum()),
            )
        return ShardRecord(
            file=shard_name(self.split, self.index),
            sha256=header.sha256,
            index_sha256=header.index_sha256,
            documents=len(lengths_N),
            tokens=int(lengths_N.sum()),
            bytes=int(bytes_N.sum()),
            domains=domains,
        )

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._domain: list[int] = []
        self._bytes: list[int] = []
        self._count = 0
