"""Arrays in a page's JSON: numbers as base64, which a browser reads without parsing each of them.

A packed array has `type`, `shape` and `data`. Whole numbers of type "bits" have `width` bits each, lowest first, and no
gaps. Numbers of type "bfloat16" are places in `values`, the values that occur, packed in the same way. Those of type
"uint32" and "float32" have four bytes each, the lowest first.
"""

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_WIDEST = 24  # bits; a browser adds a byte to what it has left of the one before, and shifts 32 bits


def whole_numbers(values: ArrayLike) -> dict[str, Any]:
    """Numbers from 0 to 2^32 - 1, in the fewest bits that hold them all."""
    values = np.asarray(values).astype(np.uint32)
    width = max(1, int(values.max(initial=0)).bit_length())
    if width > _WIDEST:
        return _packed("uint32", values.shape, values.astype("<u4").tobytes())
    return _packed("bits", values.shape, _bits(values, width), width=width)


def exact(values: ArrayLike) -> dict[str, Any]:
    """Numbers as float32."""
    values = np.asarray(values, "<f4")
    return _packed("float32", values.shape, values.tobytes())


def short(values: ArrayLike) -> dict[str, Any]:
    """Numbers as bfloat16, rounded to the nearest: within 0.4 % of the number."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to even at a tie
    kept = np.where(np.isfinite(values), rounded, bits >> 16 | np.where(np.isnan(values), 0x40, 0))
    known, places = np.unique(kept, return_inverse=True)
    width = max(1, (len(known) - 1).bit_length())
    data = _bits(places.astype(np.uint32), width)
    return _packed("bfloat16", kept.shape, data, width=width, values=known.tolist())


def unpacked(found: dict[str, Any]) -> np.ndarray:
    """The array of a packed one, as float32 or whole numbers."""
    data, shape = base64.b64decode(found["data"]), found["shape"]
    if found["type"] in ("uint32", "float32"):
        return np.frombuffer(data, np.dtype(found["type"]).newbyteorder("<")).reshape(shape)
    width, count = found["width"], int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little")
    values = bits.reshape(count, width).astype(np.uint32) @ (1 << np.arange(width, dtype=np.uint32))
    if found["type"] == "bfloat16":
        values = (np.array(found["values"], np.uint32)[values] << 16).view(np.float32)
    return values.reshape(shape)


def _bits(values: np.ndarray, width: int) -> bytes:
    bits = (values.reshape(-1, 1) >> np.arange(width, dtype=np.uint32) & 1).astype(np.uint8)
    return np.packbits(bits, bitorder="little").tobytes()


def _packed(kind: str, shape: tuple[int, ...], data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape), **more, "data": base64.b64encode(data).decode()}
