"""The shard format: a safetensors file of tokens with an index of their documents, read by memory map.

Tensors, for T tokens in N documents (each ends with the EOS token):
  tokens            uint16 or uint32 (T)
  document_offsets  int64 (N + 1)   document i is tokens[offsets[i]:offsets[i + 1]]
  document_domain   int32 (N)       index into the domains of dataset.json
  document_bytes    int64 (N)       UTF-8 bytes of the document's text
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from remoe.errors import DataError
from remoe.lab.data.manifest import SplitName, Strict

INDEX_TENSORS = ("document_offsets", "document_domain", "document_bytes")
METADATA_KEY = "remoe"  # one key, because safetensors writes several in an order that changes from run to run
_DTYPES = {"U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
_HASH_BYTES = 1 << 24


class ShardHeader(Strict):
    """What a shard says of itself in its metadata."""

    format: Literal["remoe-shard"] = "remoe-shard"
    version: Literal[1] = 1
    tokenizer_fingerprint: str
    split: SplitName
    index: int
    sha256: str
    index_sha256: str


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


@dataclass(frozen=True)
class Shard:
    """An opened shard; its arrays are memory maps, made when first used."""

    path: Path
    header: ShardHeader
    layout: dict[str, tuple[str, int, int]]  # tensor -> dtype, first byte in the file, length in elements

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids, uint16 or uint32 (T)."""
        return self._map("tokens")

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """First token of each document and, last, the number of tokens, int64 (N + 1)."""
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
    def num_tokens(self) -> int:
        """Number of tokens, from the header alone."""
        return self.layout["tokens"][2]

    @property
    def num_documents(self) -> int:
        """Number of documents, from the header alone."""
        return self.layout["document_domain"][2]

    def index_sha256(self) -> str:
        """Sha256 (hex) of the document index as it is in the file now."""
        return array_sha256(*(self._map(name) for name in INDEX_TENSORS))

    def _map(self, name: str) -> np.ndarray:
        dtype, start, length = self.layout[name]
        if length == 0:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=start, shape=(length,))

    def __getstate__(self) -> dict[str, Any]:
        # a pickled memory map would carry its whole content along
        return {"path": self.path, "header": self.header, "layout": self.layout}


def read_shard(path: Path) -> Shard:
    """Open a shard by its header; the tokens are not read.

    Raises DataError if the file is missing, truncated, damaged or no shard of this version.
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
        if set(layout) != {"tokens", *INDEX_TENSORS}:
            raise ValueError("tensors missing")
        ends = [start + count * np.dtype(dtype).itemsize for dtype, start, count in layout.values()]
    except FileNotFoundError:
        raise DataError(f"{path}: shard missing") from None
    except OSError as error:
        raise DataError(f"{path}: shard cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, struct.error, AttributeError, ValidationError):
        raise DataError(f"{path}: not a remoe shard, or its header is damaged") from None
    if max(ends) != size:
        raise DataError(f"{path}: shard truncated or damaged: {size} bytes instead of {max(ends)}")
    return Shard(path, header, layout)


def _place(entry: dict[str, Any], base: int) -> tuple[str, int, int]:
    (length,) = entry["shape"]
    return _DTYPES[entry["dtype"]], base + entry["data_offsets"][0], length
