"""Arrays in a page's JSON: little-endian numbers as base64, which a browser reads without parsing each of them."""

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_SMALLEST = (np.uint8, np.uint16, np.uint32)


def whole_numbers(values: ArrayLike) -> dict[str, Any]:
    """Numbers from 0, in the smallest type that holds them: uint8, uint16 or uint32."""
    values = np.asarray(values)
    highest = int(values.max(initial=0))
    kind = next(kind for kind in _SMALLEST if highest <= np.iinfo(kind).max)
    return _packed(np.dtype(kind).name, values.astype(kind))


def exact(values: ArrayLike) -> dict[str, Any]:
    """Numbers as float32."""
    return _packed("float32", np.asarray(values, np.float32))


def short(values: ArrayLike) -> dict[str, Any]:
    """Numbers as bfloat16, rounded to the nearest: 2 bytes each, within 0.4 % of the number."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to even at a tie
    kept = np.where(np.isfinite(values), rounded, bits >> 16 | np.where(np.isnan(values), 0x40, 0))
    return _packed("bfloat16", kept.astype(np.uint16))


def unpacked(found: dict[str, Any]) -> np.ndarray:
    """The array of a packed one, as float32 or whole numbers."""
    data = base64.b64decode(found["data"])
    if found["type"] == "bfloat16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, np.dtype(found["type"]).newbyteorder("<"))
    return values.reshape(found["shape"])


def _packed(kind: str, values: np.ndarray) -> dict[str, Any]:
    data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return {"type": kind, "shape": list(values.shape), "data": base64.b64encode(data).decode()}
