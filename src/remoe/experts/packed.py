"""Weights in 4 bits: groups of 32 neighbouring numbers of a row, each with a scale and a least value.

A group takes 20 bytes: the scale and the least value in bfloat16, then 16 bytes, of which byte j has number j in its
lower half and number j + 16 in its upper half. Five bits a number in all. A number is least + scale * (0 to 15).

Legend: J numbers of a row, a multiple of 32.
"""

from typing import Any

import torch
from torch import Tensor

from remoe.errors import ConfigError

GROUP = 32
HEADER = 4  # bytes
BYTES = HEADER + GROUP // 2


def check_packable(*widths: int) -> None:
    """Raises ConfigError for a width that 32 does not divide."""
    for width in widths:
        if width % GROUP:
            raise ConfigError(f"4 bits need rows of a multiple of {GROUP} numbers, but they have {width}")


def pack(weight: Tensor) -> Tensor:
    """Rounds a weight to 4 bits.

    Args:
        weight: (..., J), floating point.

    Returns:
        (..., J / 32 * 20) uint8.

    Raises:
        ConfigError: where 32 does not divide J.
    """
    check_packable(weight.shape[-1])
    group = weight.detach().float().unflatten(-1, (-1, GROUP))
    least = group.amin(dim=-1, keepdim=True).bfloat16()
    scale = ((group.amax(dim=-1, keepdim=True) - least.float()) / 15).bfloat16()
    step = torch.where(scale > 0, scale.float(), 1.0)
    code = ((group - least.float()) / step).round().clamp(0, 15).to(torch.uint8)
    low, high = code.chunk(2, dim=-1)
    return torch.cat((scale.view(torch.uint8), least.view(torch.uint8), low | (high << 4)), dim=-1).flatten(-2)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `pack` has rounded; (..., J / 32 * 20) uint8 to (..., J)."""
    group = packed.unflatten(-1, (-1, BYTES))
    scale, least = (part.contiguous().view(torch.bfloat16).float() for part in group[..., :HEADER].chunk(2, dim=-1))
    byte = group[..., HEADER:]
    code = torch.cat((byte & 15, byte >> 4), dim=-1)
    return (code * scale + least).flatten(-2).to(dtype)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is one that `pack` has rounded."""
    return weight.dtype == torch.uint8


def is_quantised(weight: Any) -> bool:
    """Whether a weight is packed, or one of torchao's: its experts must be dequantised before they run."""
    return is_packed(weight) or (hasattr(weight, "dequantize") and hasattr(weight, "qdata"))
