"""`dataset.json`: what a prepared dataset is made of, and the fingerprint that names it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from remoe.errors import DataError

MANIFEST_NAME = "dataset.json"
FORMAT = "remoe-dataset"
VERSION = 1

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


class Strict(BaseModel):
    """Base of the files' records: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


RecordT = TypeVar("RecordT", bound=Strict)


class Counts(Strict):
    """Size of some text: documents, tokens (end-of-text tokens included) and UTF-8 bytes."""

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
    """All shards of one split, and their sums."""

    shards: list[ShardRecord]
    domains: dict[str, Counts]


class Manifest(Strict):
    """Content of `dataset.json`; `fingerprint` covers all that determines the tokens and their order."""

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

    def content_fingerprint(self) -> str:
        """Sha256 (hex) over the content that determines the data; where it came from is left out."""
        provenance = {"fingerprint", "sources", "validation", "validation_fraction", "seed"}
        content = self.model_dump(exclude=provenance)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's content, the same bytes for the same manifest."""
        return (json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n").encode()


def summarise(shards: list[ShardRecord]) -> SplitRecord:
    """Add the records of a split's shards up."""
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
        raise DataError(f"{path}: does not agree with its own fingerprint: it was changed by hand or damaged")
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
