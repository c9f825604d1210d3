"""Datasets of Megatron's token files: indexed once, with the tokens left where they are and read by memory map.

`PREFIX.bin` holds the token ids of all sequences, one after the other. `PREFIX.idx` describes them (little-endian):
  9 bytes        MMIDIDX and two zeros
  uint64         version, 1
  uint8          type of the ids: 4 int32, 8 uint16
  uint64, uint64 S sequences, D + 1 bounds of documents
  int32 (S)      tokens of each sequence
  int64 (S)      first byte of each sequence in PREFIX.bin
  int64 (D + 1)  first sequence of each document, then S
Source: `megatron.core.datasets.indexed_dataset` of megatron-core 0.16.1.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from remoe.errors import ConfigError, DataError
from remoe.lab.console import say
from remoe.lab.data.dataset import Dataset, open_dataset, spread
from remoe.lab.data.manifest import (
    MANIFEST_NAME,
    METADATA_KEY,
    SPLITS,
    Counts,
    Manifest,
    ShardHeader,
    ShardRecord,
    SplitName,
    TokensFile,
    array_sha256,
    shard_name,
    summarise,
)
from remoe.lab.data.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from remoe.lab.files import files_signature, locked, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAGIC, VERSION, HEADER = b"MMIDIDX\0\0", 1, struct.Struct("<9sQBQQ")
DTYPES = {4: "<u4", 8: "<u2"}  # ids are never negative: int32 is read as uint32
HELD_OUT, MOST_HELD_OUT = 0.02, 2**22  # share of a file's tokens for validation, and the most tokens
CHECKED_DOCUMENTS, DECODED_DOCUMENTS = 256, 1024


@dataclass(frozen=True)
class TokenFile:
    """The files PREFIX.bin and PREFIX.idx; raises DataError, where they are read, if they do not fit together."""

    prefix: Path

    @property
    def tokens_path(self) -> Path:
        """PREFIX.bin."""
        return self.prefix.with_name(f"{self.prefix.name}.bin")

    @property
    def index_path(self) -> Path:
        """PREFIX.idx."""
        return self.prefix.with_name(f"{self.prefix.name}.idx")

    @cached_property
    def _header(self) -> tuple[int, int, int]:
        """Code of the type, number of sequences and of bounds of documents."""
        with self.index_path.open("rb") as file:
            content = file.read(HEADER.size)
        if len(content) < HEADER.size or not content.startswith(MAGIC):
            raise DataError(f"{self.index_path}: not an index of Megatron's token files")
        _, version, code, sequences, bounds = HEADER.unpack(content)
        if version != VERSION:
            raise DataError(f"{self.index_path}: version {version} of Megatron's index; this remoe reads {VERSION}")
        if code not in DTYPES:
            raise DataError(f"{self.index_path}: token ids of type {code}; uint16 (8) and int32 (4) can be read")
        if self.index_path.stat().st_size < HEADER.size + 12 * sequences + 8 * bounds:
            raise DataError(f"{self.index_path}: truncated")
        return code, sequences, bounds

    @property
    def dtype(self) -> str:
        """NumPy's name of the ids' type, unsigned."""
        return DTYPES[self._header[0]]

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """First token of each document that is not empty, then the number of tokens, int64 (D + 1)."""
        _, sequences, bounds = self._header
        size, starts = np.dtype(self.dtype).itemsize, HEADER.size + 4 * sequences
        length_S = np.memmap(self.index_path, "<i4", "r", HEADER.size, (sequences,)) if sequences else np.empty(0, "i4")
        offset_S = np.concatenate([np.zeros(1, np.int64), np.cumsum(length_S, dtype=np.int64)])
        first_byte_S = np.memmap(self.index_path, "<i8", "r", starts, (sequences,)) if sequences else np.empty(0, "i8")
        bound_D = np.memmap(self.index_path, "<i8", "r", starts + 8 * sequences, (bounds,)) if bounds else [0]
        whole = bound_D[0] == 0 and bound_D[-1] == sequences and bool((np.diff(bound_D) >= 0).all())
        if not whole or (sequences and length_S.min() < 0) or not np.array_equal(first_byte_S, offset_S[:-1] * size):
            raise DataError(f"{self.index_path}: damaged: its sequences or documents do not follow one another")
        found = self.tokens_path.stat().st_size
        if found != offset_S[-1] * size:
            raise DataError(f"{self.tokens_path}: {found} bytes, but its index describes {offset_S[-1] * size}")
        offset_D = np.unique(offset_S[bound_D])
        if len(offset_D) < 2:
            raise DataError(f"{self.tokens_path}: no tokens")
        return offset_D

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids, uint16 or uint32 (T), a memory map."""
        return np.memmap(self.tokens_path, self.dtype, "r", shape=(int(self.document_offsets[-1]),))


@dataclass(frozen=True)
class Part:
    """Consecutive documents of a token file, those from number `first` to before `end`; all are one domain."""

    file: TokenFile
    first: int
    end: int

    @property
    def domain(self) -> str:
        """The prefix's name."""
        return self.file.prefix.name

    @property
    def offsets(self) -> np.ndarray:
        """First token of each document in the file, and the end of the last, int64 (N + 1)."""
        return self.file.document_offsets[self.first : self.end + 1]

    @property
    def tokens(self) -> np.ndarray:
        """Its token ids (T)."""
        return self.file.tokens[self.offsets[0] : self.offsets[-1]]


def find_token_files(data: str) -> dict[SplitName, list[TokenFile]]:
    """The token files that `--data` names, by split; empty if it names none.

    It may be PREFIX, PREFIX.bin, PREFIX.idx, a folder of such files, or one with the folders train and validation.
    """
    path = Path(data)
    if path.is_dir():
        if any((path / "train").glob("*.idx")) and any((path / "validation").glob("*.idx")):
            return {split: _files_in(path / split) for split in SPLITS}
        files = _files_in(path)
    else:
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        files = [file] if (file := TokenFile(prefix)).index_path.is_file() else []
    return {"train": files} if files else {}


def open_token_files(files: dict[SplitName, list[TokenFile]], parent: Path, tokenizer: str | Path | None) -> Dataset:
    """The dataset of token files; its description is written once, into a folder of `parent`/data.

    Every byte is read once, for a hash. Without files for validation, the last documents of each file are held out: as
    many as have 2 % of its tokens, or 2^22 tokens. Files that have changed get a new folder.

    Args:
        files: as `find_token_files` returns them.
        parent: folder.
        tokenizer: that made the files: a folder, or a name on the hub.

    Raises:
        ConfigError: without a tokenizer.
        DataError: for files that are missing or damaged, of ids of several types, or with documents that do not end
            with the tokenizer's EOS token.
    """
    source = files["train"][0].prefix
    if tokenizer is None:
        raise ConfigError(f"{source}: token files of Megatron: name with --tokenizer the tokenizer that made them")
    loaded = load_tokenizer(tokenizer)
    paths = [path for split in files.values() for file in split for path in (file.tokens_path, file.index_path)]
    identity = [*files_signature([path.resolve() for path in paths]), tokenizer_fingerprint(loaded)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    name = source.name if len(files["train"]) == 1 else source.parent.resolve().name
    out = parent / "data" / f"{name}-indexed-{digest}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent, None):  # where several commands start together, one writes it and the others wait
        if not (out / MANIFEST_NAME).exists():
            say(f"reading the token files of {source.parent} once, for their index in {out}")
            parts = _divided(files)
            _check(parts, loaded)
            with new_folder(out) as folder:
                _write(parts, loaded, folder)
    return open_dataset(out)


def _files_in(folder: Path) -> list[TokenFile]:
    return [TokenFile(path.with_suffix("")) for path in sorted(folder.glob("*.idx"))]


def _divided(files: dict[SplitName, list[TokenFile]]) -> dict[SplitName, list[Part]]:
    if "validation" in files:
        return {split: [Part(file, 0, len(file.document_offsets) - 1) for file in files[split]] for split in SPLITS}
    parts: dict[SplitName, list[Part]] = {"train": [], "validation": []}
    for file in files["train"]:
        offset_D, documents = file.document_offsets, len(file.document_offsets) - 1
        kept = offset_D[-1] - min(HELD_OUT * offset_D[-1], MOST_HELD_OUT)
        cut = max(int(np.searchsorted(offset_D, kept, side="right")) - 1, 1)
        parts["train"].append(Part(file, 0, min(cut, documents)))
        if cut < documents:
            parts["validation"].append(Part(file, cut, documents))
    if not parts["validation"]:
        raise DataError(
            f"{files['train'][0].prefix}: a single document, so none can be held out: put the files for training and"
            " for validation into the folders train and validation"
        )
    return parts


def _check(parts: dict[SplitName, list[Part]], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError unless the ids are of one type, and documents end with EOS, of which some are looked at."""
    every = [part for split in parts.values() for part in split]
    other = next((part for part in every if part.file.dtype != every[0].file.dtype), None)
    if other is not None:
        raise DataError(f"{other.file.prefix}: ids of another type than those of {every[0].file.prefix}")
    for part in every:
        document_N = spread(len(part.offsets) - 1, CHECKED_DOCUMENTS, 1)
        last_N = part.file.tokens[part.offsets[1:][document_N] - 1]
        if bad := [number for number, last in zip(document_N, last_N, strict=True) if last != tokenizer.eos_token_id]:
            raise DataError(
                f"{part.file.tokens_path}: document {part.first + bad[0]} does not end with {tokenizer.eos_token_id},"
                " the EOS token of the tokenizer; Megatron's preprocessing writes it with --append-eod"
            )


def _write(parts: dict[SplitName, list[Part]], tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    domains = sorted({part.domain for split in parts.values() for part in split})
    records: dict[SplitName, list[ShardRecord]] = {split: [] for split in SPLITS}
    for split, found in records.items():
        for number, part in enumerate(parts[split]):
            found.append(_write_shard(part, split, number, domains, tokenizer, folder))
    first = parts["train"][0].file
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=vocabulary_size(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        token_dtype={"<u2": "uint16", "<u4": "uint32"}[first.dtype],
        domains=domains,
        sources=[str(part.file.prefix.resolve()) for part in parts["train"]],
        validation=[str(part.file.prefix.resolve()) for part in parts["validation"]],
        validation_fraction=None,
        seed=None,
        splits={split: summarise(found) for split, found in records.items()},
    )
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _write_shard(
    part: Part,
    split: SplitName,
    number: int,
    domains: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
) -> ShardRecord:
    """Writes the index of some documents, whose tokens stay where they are."""
    offset_N = part.offsets - part.offsets[0]
    documents = len(offset_N) - 1
    # Only the bytes of validation text are asked for, in bits per byte; those of all text would need it decoded.
    byte_N = _text_bytes(part, tokenizer) if split == "validation" else np.zeros(documents, np.int64)
    index = {
        "document_offsets": offset_N,
        "document_domain": np.full(documents, domains.index(part.domain), np.int32),
        "document_bytes": byte_N,
    }
    header = ShardHeader(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        split=split,
        index=number,
        sha256=array_sha256(part.tokens),
        index_sha256=array_sha256(*index.values()),
        tokens_file=TokensFile(
            path=str(part.file.tokens_path.resolve()),
            size=part.file.tokens_path.stat().st_size,
            dtype=part.file.dtype,
            start=int(part.offsets[0]) * np.dtype(part.file.dtype).itemsize,
            length=int(offset_N[-1]),
        ),
    )
    name = shard_name(split, number)
    save_file(index, folder / name, metadata={METADATA_KEY: header.to_json()})
    counts = Counts(documents=documents, tokens=int(offset_N[-1]), bytes=int(byte_N.sum()))
    return ShardRecord(
        file=name,
        sha256=header.sha256,
        index_sha256=header.index_sha256,
        domains={part.domain: counts},
        **counts.model_dump(),
    )


def _text_bytes(part: Part, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """UTF-8 bytes of each document's text, without its EOS token, int64 (N)."""
    offset_N, sizes = part.offsets, []
    for first in range(0, len(offset_N) - 1, DECODED_DOCUMENTS):
        bound_n = offset_N[first : first + DECODED_DOCUMENTS + 1]
        ids = [part.file.tokens[start : end - 1].tolist() for start, end in pairwise(bound_n)]
        texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        sizes += [len(text.encode()) for text in texts]
    return np.array(sizes, np.int64)
