"""The files of a prepared dataset: `dataset.json`, which describes it, and shards, which hold its tokens.

A shard is a safetensors file of tokens with an index of their documents, read by memory map. Its tensors, for
T tokens in N documents (each ends with the EOS token):
  tokens            uint16 or uint32 (T)
  document_offsets  int64 (N + 1)   document i is tokens[offsets[i]:offsets[i + 1]]
  document_domain   int32 (N)       index into the domains of dataset.json
  document_bytes    int64 (N)       UTF-8 bytes of the document's text
A shard of Megatron's token files has no `tokens`: its metadata says where in PREFIX.bin they are (`tokens_file`), and
its document_bytes are 0 for training text.
A dataset with `stream` has shards of validation alone; `stream.py` reads its training text.
Shards of conversations have one more, and their document_bytes count the answers alone:
  targets           uint8 (T)       1 for a token of an answer, which the loss is about, otherwise 0
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from remoe.errors import DataError

MANIFEST_NAME = "dataset.json"
FORMAT = "remoe-dataset"
VERSION = 1

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")

INDEX_TENSORS = ("document_offsets", "document_domain", "document_bytes")
TARGETS = "targets"
METADATA_KEY = "remoe"  # a single key, because safetensors writes several in an order that changes between runs
_DTYPES = {"U8": "|u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
_HASH_BYTES = 1 << 24


class Strict(BaseModel):
    """Base of the records in files: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


RecordT = TypeVar("RecordT", bound=Strict)


class Counts(Strict):
    """Size of some text: documents, tokens (including end-of-text tokens) and UTF-8 bytes."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


class ShardRecord(Counts):
    """One finished shard: its size, the sha256 of its tokens and of its document index, its domains."""

    file: str
    sha256: str
    index_sha256: str
    domains: dict[str, Counts]


class SplitRecord(Counts):
    """All shards of one split, with their totals."""

    shards: list[ShardRecord]
    domains: dict[str, Counts]


class StreamRecord(Strict):
    """The training text of a dataset that is read as a stream, see `stream.py`.

    Attributes:
        source: what `--data` named, with absolute paths.
        column: of its text.
        identity: sha256 (hex) of its files' names, sizes and times, or of their addresses on the hub.
        files: how many there are.
    """

    source: str
    column: str
    identity: str
    files: int


class Manifest(Strict):
    """Content of `dataset.json`; `fingerprint` covers everything that determines the tokens and their order."""

    format: Literal["remoe-dataset"] = FORMAT
    version: Literal[1] = VERSION
    fingerprint: str = ""
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    token_dtype: Literal["uint16", "uint32"]
    domains: list[str]
    sources: list[str]
    validation: list[str]
    validation_fraction: float | None
    seed: int | None
    splits: dict[SplitName, SplitRecord]
    stream: StreamRecord | None = None

    def content_fingerprint(self) -> str:
        """Sha256 (hex) over the content that determines the data, which excludes where it came from."""
        provenance = {"fingerprint", "sources", "validation", "validation_fraction", "seed"}
        content = self._dump(exclude=provenance)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's content; equal manifests give equal bytes."""
        return (json.dumps(self._dump(), indent=2, ensure_ascii=False) + "\n").encode()

    def _dump(self, exclude: set[str] = frozenset()) -> dict[str, Any]:
        """As in version 0.1.0 where the training text is in shards."""
        return self.model_dump(exclude=exclude | ({"stream"} if self.stream is None else set()))


def summarise(shards: list[ShardRecord]) -> SplitRecord:
    """The record of a split: its shards' records and their totals."""
    total = Counts()
    domains: dict[str, Counts] = {}
    for shard in shards:
        total += shard
        for name, counts in shard.domains.items():
            domains[name] = domains.get(name, Counts()) + counts
    return SplitRecord(shards=shards, domains=dict(sorted(domains.items())), **total.model_dump())


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/dataset.json`; raises DataError if it is missing, foreign, newer or altered."""
    path = folder / MANIFEST_NAME
    manifest = read_record(path, Manifest, FORMAT, VERSION)
    if manifest.content_fingerprint() != manifest.fingerprint:
        raise DataError(f"{path}: does not match its own fingerprint: it was edited or damaged")
    return manifest


def read_record(path: Path, kind: type[RecordT], name: str, version: int) -> RecordT:
    """Read a JSON file of the given format and version; raises DataError for anything else."""
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{path}: damaged: it is not valid JSON") from None
    if not isinstance(content, dict) or content.get("format") != name:
        raise DataError(f"{path}: not a file of the format {name!r}")
    if content.get("version") != version:
        raise DataError(f"{path}: format version {content.get('version')}, but this remoe reads version {version}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: damaged: {place}: {first['msg']}") from None


class TokensFile(Strict):
    """Where a shard's tokens are, if they are in a file that another program wrote."""

    path: str
    size: int  # of the whole file, in bytes
    dtype: Literal["<u2", "<u4"]
    start: int  # first byte
    length: int  # in tokens


class ShardHeader(Strict):
    """What a shard's metadata says about it."""

    format: Literal["remoe-shard"] = "remoe-shard"
    version: Literal[1] = 1
    tokenizer_fingerprint: str
    split: SplitName
    index: int
    sha256: str
    index_sha256: str
    tokens_file: TokensFile | None = None

    def to_json(self) -> str:
        """The metadata's text; as in version 0.1.0 where the shard has its own tokens."""
        return self.model_dump_json(exclude_none=True)


@dataclass(frozen=True)
class Shard:
    """An opened shard; its arrays are memory maps, created when first used."""

    path: Path
    header: ShardHeader
    layout: dict[str, tuple[str, int, int]]  # tensor -> dtype, first byte in the file, length in elements

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids, uint16 or uint32 (T)."""
        return self._map("tokens")

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """First token of each document, then the number of tokens, int64 (N + 1)."""
        return self._map("document_offsets")

    @cached_property
    def document_domain(self) -> np.ndarray:
        """Domain of each document, int32 (N)."""
        return self._map("document_domain")

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 (N)."""
        return self._map("document_bytes")

    @property
    def masked(self) -> bool:
        """Whether only some tokens are targets of the loss: those of answers in conversations."""
        return TARGETS in self.layout

    @cached_property
    def targets(self) -> np.ndarray:
        """Which tokens are targets, uint8 (T) of 0 and 1; only where the shard is `masked`."""
        return self._map(TARGETS)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, from the header alone."""
        return self.layout["tokens"][2]

    @property
    def num_documents(self) -> int:
        """Number of documents, from the header alone."""
        return self.layout["document_domain"][2]

    @property
    def size(self) -> int:
        """Bytes of the arrays, from the header alone."""
        return sum(np.dtype(dtype).itemsize * length for dtype, _, length in self.layout.values())

    def index_sha256(self) -> str:
        """Sha256 (hex) of the document index, and of the targets where there are any, as they now are in the file."""
        names = (*INDEX_TENSORS, TARGETS) if self.masked else INDEX_TENSORS
        return array_sha256(*(self._map(name) for name in names))

    def _map(self, name: str) -> np.ndarray:
        dtype, start, length = self.layout[name]
        if length == 0:
            return np.empty(0, dtype)
        elsewhere = self.header.tokens_file if name == "tokens" else None
        path = Path(elsewhere.path) if elsewhere else self.path
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(length,))

    def __getstate__(self) -> dict[str, Any]:
        # pickling a memory map would copy its whole content
        return {"path": self.path, "header": self.header, "layout": self.layout}


def shard_name(split: SplitName, index: int) -> str:
    """File name of a shard."""
    return f"{split}-{index:05d}.safetensors"


def array_sha256(*arrays: np.ndarray) -> str:
    """Sha256 (hex) over the bytes of contiguous arrays, one after the other, read piece by piece."""
    digest = hashlib.sha256()
    for array in arrays:
        content = memoryview(array).cast("B") if array.size else b""
        for start in range(0, len(content), _HASH_BYTES):
            digest.update(content[start : start + _HASH_BYTES])
    return digest.hexdigest()


def read_shard(path: Path) -> Shard:
    """Open a shard by its header, without reading the tokens.

    Raises DataError if the file is missing, truncated, damaged or not a shard of this version.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("header cut short")
            content = json.loads(file.read(length))
        header = ShardHeader.model_validate_json(content.pop("__metadata__")[METADATA_KEY])
        layout = {name: _place(entry, 8 + length) for name, entry in content.items()}
        expected = {*INDEX_TENSORS} if header.tokens_file else {"tokens", *INDEX_TENSORS}
        if set(layout) - {TARGETS} != expected:
            raise ValueError("tensors missing")
        ends = [start + count * np.dtype(dtype).itemsize for dtype, start, count in layout.values()]
        if (file := header.tokens_file) is not None:
            layout["tokens"] = (file.dtype, file.start, file.length)
        if TARGETS in layout and layout[TARGETS][2] != layout["tokens"][2]:
            raise ValueError("not a target for each token")
    except FileNotFoundError:
        raise DataError(f"{path}: shard missing") from None
    except OSError as error:
        raise DataError(f"{path}: shard cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, struct.error, AttributeError, ValidationError):
        raise DataError(f"{path}: not a remoe shard, or its header is damaged") from None
    if max(ends) != size:
        raise DataError(f"{path}: shard truncated or damaged: {size} bytes instead of {max(ends)}")
    if header.tokens_file is not None:
        _check_tokens_file(header.tokens_file)
    return Shard(path, header, layout)


def _check_tokens_file(file: TokensFile) -> None:
    try:
        size = Path(file.path).stat().st_size
    except OSError as error:
        raise DataError(f"{file.path}: {error.strerror}; it has the tokens of the dataset") from None
    if size != file.size:
        raise DataError(f"{file.path}: changed since the dataset was made: {size} bytes instead of {file.size}")


def _place(entry: dict[str, Any], base: int) -> tuple[str, int, int]:
    (length,) = entry["shape"]
    return _DTYPES[entry["dtype"]], base + entry["data_offsets"][0], length
