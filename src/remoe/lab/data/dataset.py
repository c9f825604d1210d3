"""Opening a prepared dataset, with checks that no file is missing, foreign or damaged."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from remoe.errors import DataError
from remoe.lab.data.documents import known_suffix
from remoe.lab.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardRecord,
    SplitName,
    SplitRecord,
    array_sha256,
    read_manifest,
    read_shard,
)
from remoe.lab.data.sources import is_raw
from remoe.lab.data.tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE_BYTES = 64 * 2**20  # shards of so many bytes altogether are read in well under a second
SAMPLED_BLOCKS, BLOCK_TOKENS, SAMPLED_DOCUMENTS = 16, 8192, 64


@dataclass(frozen=True)
class Split:
    """One split of a dataset: its shards, in order, and its size."""

    name: SplitName
    path: Path
    domains: tuple[str, ...]
    shards: tuple[Shard, ...]
    record: SplitRecord
    vocab_size: int

    @property
    def masked(self) -> bool:
        """Whether only the answers of conversations are targets of the loss."""
        return any(shard.masked for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, including the EOS token of each document."""
        return self.record.tokens

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return self.record.documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's text."""
        return self.record.bytes


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    path: Path
    manifest: Manifest
    train: Split
    validation: Split

    @property
    def streamed(self) -> bool:
        """Whether the training text is read while a model trains; the training split is then empty."""
        return self.manifest.stream is not None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id of the tokenizer."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.eos_token_id

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the data: tokens, their order, domains and tokenizer."""
        return self.manifest.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """Sha256 (hex) of the tokenizer's definition."""
        return self.manifest.tokenizer_fingerprint

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of their numbers in shards."""
        return tuple(self.manifest.domains)

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer, which transformers can load."""
        return self.path / "tokenizer"

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase", whose: str) -> None:
        """Raise DataError unless the shards were made with this tokenizer; `whose` names its owner in the message."""
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise DataError(f"{self.path} was prepared with a tokenizer different from that of {whose}")

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer; raises DataError if it is missing or not the one that made the shards."""
        if not self.tokenizer_path.is_dir():
            raise DataError(f"{self.tokenizer_path}: the dataset's tokenizer is missing")
        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise DataError(f"{self.tokenizer_path}: not the tokenizer that made the shards")
        return tokenizer


def open_dataset(path: str | Path, tokenizer: str | Path | None = None) -> Dataset:
    """Open a dataset that `prepare` made, with every check that does not read the tokens.

    Raises DataError for a missing or unfinished dataset, and for a shard that is missing, truncated, made with
    another tokenizer, of another split, or different from the one that dataset.json lists. If the path is that of
    raw text, the error says how to prepare it, with `tokenizer` if that is given.
    """
    folder = Path(path)
    if _has_text(folder):
        options = "" if tokenizer is None else f" --tokenizer {shlex.quote(str(tokenizer))}"
        command = f"remoe data prepare {shlex.quote(str(folder))} --out DIR{options}"
        raise DataError(f"{folder}: raw text, and this needs a dataset; this command makes one: {command}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such dataset folder; `remoe data prepare` makes one")
    if not (folder / MANIFEST_NAME).exists():
        if (folder / "preparation.json").exists():
            raise DataError(f"{folder}: unfinished; run the same `remoe data prepare` command again to finish it")
        raise DataError(f"{folder}: not a dataset: it has no {MANIFEST_NAME}")
    manifest = read_manifest(folder)
    return Dataset(
        folder, manifest, _open_split(folder, manifest, "train"), _open_split(folder, manifest, "validation")
    )


def _has_text(path: Path) -> bool:
    """Whether this is text that can be prepared: a file, or a folder that has such files near its top."""
    if not is_raw(str(path)):
        return False
    found = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/*")]
    return any(known_suffix(file) for file in found)


def verify_hashes(dataset: Dataset) -> None:
    """Read every shard and compare it with its sha256; raises DataError naming every shard that differs.

    Raises DataError also for a shard with a token id that is outside of the vocabulary.
    """
    damaged = []
    for split in (dataset.train, dataset.validation):
        for shard, record in zip(split.shards, split.record.shards, strict=True):
            found = (array_sha256(shard.tokens), shard.index_sha256())
            if found != (record.sha256, record.index_sha256):
                damaged.append(record.file)
    if damaged:
        raise DataError(f"{dataset.path}: damaged (sha256 differs): {', '.join(damaged)}")
    for split in (dataset.train, dataset.validation):
        for shard in split.shards:
            for start in range(0, shard.num_tokens, WHOLE_BYTES):
                check_ids(shard, start, shard.tokens[start : start + WHOLE_BYTES], split.vocab_size)


def spot_check(dataset: Dataset) -> None:
    """Look for damage in at most about a second; `verify_hashes` finds all, but reads everything.

    A small dataset is verified whole. Of each shard of a larger one some blocks are read: their token ids must be in
    the vocabulary; its documents must be of a domain, follow one another and end with the EOS token. Raises
    DataError naming the shard.
    """
    shards = [(split, shard) for split in (dataset.train, dataset.validation) for shard in split.shards]
    if sum(shard.size for _, shard in shards) <= WHOLE_BYTES:
        verify_hashes(dataset)
        return
    for split, shard in shards:
        for start in spread(shard.num_tokens, SAMPLED_BLOCKS, BLOCK_TOKENS):
            check_ids(shard, start, shard.tokens[start : start + BLOCK_TOKENS], split.vocab_size)
        for first in spread(shard.num_documents, SAMPLED_BLOCKS, SAMPLED_DOCUMENTS):
            _check_documents(shard, first, dataset)


def check_ids(shard: Shard, start: int, tokens_T: np.ndarray, vocab_size: int) -> None:
    """Raise DataError, which names the shard, if one of its tokens from number `start` on is not in the vocabulary."""
    if len(tokens_T) and int(tokens_T.max()) >= vocab_size:
        place = int(np.argmax(tokens_T >= vocab_size))
        raise DataError(
            f"{shard.path}: damaged: token {start + place} has id {tokens_T[place]}, but the vocabulary has"
            f" {vocab_size} ids; `remoe data check` finds all damage"
        )


def spread(count: int, blocks: int, size: int) -> list[int]:
    """Starts of at most `blocks` blocks of `size` items, evenly spread over `count` items, both ends among them."""
    return sorted({round(start) for start in np.linspace(0, max(count - size, 0), blocks)})


def _check_documents(shard: Shard, first: int, dataset: Dataset) -> None:
    last = min(first + SAMPLED_DOCUMENTS, shard.num_documents)
    offsets_N = shard.document_offsets[first : last + 1]
    domain_N, bytes_N = shard.document_domain[first:last], shard.document_bytes[first:last]
    ordered = (offsets_N[0] == 0 if first == 0 else offsets_N[0] > 0) and bool((np.diff(offsets_N) > 0).all())
    ordered &= offsets_N[-1] == shard.num_tokens if last == shard.num_documents else offsets_N[-1] < shard.num_tokens
    known = bool(((domain_N >= 0) & (domain_N < len(dataset.domains)) & (bytes_N >= 0)).all())
    if not (ordered and known and _end_with_eos(shard, offsets_N, dataset.eos_token_id)):
        raise DataError(
            f"{shard.path}: damaged: documents {first} to {last - 1} are not as they were written;"
            " `remoe data check` finds all damage"
        )


def _end_with_eos(shard: Shard, offsets_N: np.ndarray, eos: int) -> bool:
    """Whether the documents end with EOS, and do not all begin with it: EOS is often 0, which lost pages hold."""
    starts, ends = offsets_N[:-1], offsets_N[1:]
    starts = starts[ends - starts > 1]
    lost = len(starts) > 0 and bool((shard.tokens[starts] == eos).all())
    return not lost and bool((shard.tokens[ends - 1] == eos).all())


def _open_split(folder: Path, manifest: Manifest, name: SplitName) -> Split:
    record = manifest.splits[name]
    shards = tuple(_open_shard(folder, manifest, name, number, entry) for number, entry in enumerate(record.shards))
    return Split(name, folder, tuple(manifest.domains), shards, record, manifest.vocab_size)


def _open_shard(folder: Path, manifest: Manifest, split: SplitName, number: int, record: ShardRecord) -> Shard:
    path = folder / record.file
    shard = read_shard(path)
    header = shard.header
    if header.tokenizer_fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(f"{path}: foreign shard: made with another tokenizer")
    if (header.split, header.index) != (split, number):
        raise DataError(f"{path}: foreign shard: it is number {header.index} of a {header.split} split")
    sizes = (shard.num_tokens, shard.num_documents, header.sha256, header.index_sha256)
    if sizes != (record.tokens, record.documents, record.sha256, record.index_sha256):
        raise DataError(f"{path}: foreign shard: its content differs from the record in {MANIFEST_NAME}")
    if shard.layout["tokens"][0] != {"uint16": "<u2", "uint32": "<u4"}[manifest.token_dtype]:
        raise DataError(f"{path}: foreign shard: its tokens are not {manifest.token_dtype}")
    return shard
