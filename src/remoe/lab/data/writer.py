"""Writing shards: whole documents, in order, each shard complete on the disk before the next begins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from remoe.lab.data.manifest import Counts, ShardRecord, SplitName
from remoe.lab.data.shards import METADATA_KEY, ShardHeader, array_sha256, shard_name
from remoe.lab.files import replacing


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever the next would make it too large.

    `finished` is told of each shard once it is safely on the disk.
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

    def add(self, tokens_S: np.ndarray, domain: str, num_bytes: int) -> None:
        """Take one document: its tokens with the EOS token, uint16 or uint32 (S), and its UTF-8 bytes."""
        if self._tokens and self._count + len(tokens_S) > self.shard_tokens:
            self.flush()
        self._tokens.append(tokens_S)
        self._count += len(tokens_S)
        self._domain.append(self._domain_index[domain])
        self._bytes.append(num_bytes)

    def flush(self) -> None:
        """Write what is collected as a shard; raises DataError where the disk is full."""
        if not self._tokens:
            return
        lengths = np.array([len(part) for part in self._tokens], dtype=np.int64)
        arrays = {
            "tokens": np.concatenate(self._tokens),
            "document_offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            "document_domain": np.array(self._domain, dtype=np.int32),
            "document_bytes": np.array(self._bytes, dtype=np.int64),
        }
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
            save_file(arrays, temporary, metadata={METADATA_KEY: header.model_dump_json()})
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
        self._domain: list[int] = []
        self._bytes: list[int] = []
        self._count = 0
