"""How the kernels are launched on each kind of device: tile sizes, stages, warps and programs.

Tile sizes are a table and not found by trials on the first call: trials would wait for the device, delay the start,
and let two runs differ.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, W rows of a window.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut: columns, depth of a step, warps, stages of the pipeline, programs per multiprocessor.

    registers: the most that a thread may take, so that several programs fit; None for as many as it wants.
    exact: as many columns as said, however many of them a width leaves unused.
    rows: of a weight gradient's tile, whose rows are no pairs.
    """

    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1
    registers: int | None = None
    exact: bool = False
    rows: int = 128

    @property
    def compiled(self) -> dict[str, int]:
        """What a launch says of it to the compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit

    def block(self, width: int) -> int:
        """Columns for a matrix of this width."""
        return min(self.columns, max(16, power_of_two(width))) if self.exact else _block(width, self.columns)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The cuts of all products on one kind of device.

    rows: pairs of a tile.
    described: weights and rows of pairs are read by tensor descriptors (the bulk copies of compute capability 9.0),
        where their sizes allow it.
    """

    rows: int
    up: Tile
    down: Tile
    hidden_gradient: Tile
    rows_gradient: Tile
    gate_up_gradient: Tile
    down_gradient: Tile
    described: bool = False

    def can_describe(self, D: int, F: int) -> bool:
        """Whether experts of this size are read by descriptors: no step reaches behind an expert's rows."""
        tiles = (self.up, self.hidden_gradient, self.down, self.rows_gradient)
        depths = zip(tiles, (D, D, F, 2 * F), strict=True)
        return self.described and not any(width % tile.depth for tile, width in depths)


TILES = {
    # 16-bit numbers, 200 KiB of shared memory and more: compute capability 9.0, 10.0. The fastest that
    # benchmarks/tune_tiles.py found on an H200.
    "large": Tiles(
        rows=128,
        up=Tile(256, 64, 8, 4, exact=True),
        down=Tile(256, 64, 8, 3),
        hidden_gradient=Tile(128, 64, 8, 3, 2, 128),
        rows_gradient=Tile(256, 64, 8, 3),
        # Wide where the rows are read by descriptors. The others are found through the list of tokens, which takes
        # stages of its own.
        gate_up_gradient=Tile(128, 64, 8, 5, rows=256),
        down_gradient=Tile(256, 64, 8, 5, exact=True),
        described=True,
    ),
    # The same with few tokens, as in decoding: narrow tiles, so that all multiprocessors read weights, and deep ones,
    # so that each has many bytes under way.
    "large, few": Tiles(
        rows=32,
        up=Tile(32, 256, 4, 4, 3),
        down=Tile(16, 256, 4, 4, 4),
        hidden_gradient=Tile(64, 64, 4, 3, 2),
        rows_gradient=Tile(32, 64, 4, 3, 2),
        gate_up_gradient=Tile(64, 32, 4, 5, 2, rows=32),
        down_gradient=Tile(64, 32, 4, 5, 2, rows=32),
    ),
    # 16-bit numbers elsewhere
    "small": Tiles(
        rows=128,
        up=Tile(128, 32, 8, 4),
        down=Tile(128, 32, 8, 4),
        hidden_gradient=Tile(64, 32, 8, 4),
        rows_gradient=Tile(128, 32, 8, 4),
        gate_up_gradient=Tile(128, 32, 8, 6),
        down_gradient=Tile(128, 32, 8, 6),
    ),
    "float32": Tiles(64, *[Tile(64, 32, 4, 2, 2, rows=64)] * 6),  # type: ignore[arg-type]
    # Small, and so that F = 36 and F = 48 have a narrow last tile, and D = 80.
    "interpreted": Tiles(
        rows=16,
        up=Tile(64, 16, 1, 1, exact=True),
        down=Tile(32, 16, 1, 1),
        hidden_gradient=Tile(32, 16, 1, 1, exact=True),
        rows_gradient=Tile(32, 16, 1, 1),
        gate_up_gradient=Tile(32, 16, 1, 1, rows=64),
        down_gradient=Tile(32, 16, 1, 1, rows=32),
        described=True,
    ),
}
FEW = 32  # tokens up to which they are few
NARROW = 32  # columns of the narrowest block that may be cut to half
GROUP = 8  # rows of tiles that are worked on together
SUM_BLOCK = 1024


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device: TRITON_INTERPRET=1 before its first import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@cache
def device_tiles(device: torch.device, dtype: torch.dtype, few: bool) -> tuple[Tiles, int]:
    """Tiles, for few tokens where `few`, and the number of multiprocessors."""
    if interpreted():
        return TILES["interpreted"], 3  # few, so that a program has several tiles
    properties: Any = torch.cuda.get_device_properties(device)
    large = properties.shared_memory_per_block_optin >= 200 * 1024
    name = "float32" if dtype == torch.float32 else ("large, few" if few else "large") if large else "small"
    return TILES[name], properties.multi_processor_count


def _block(width: int, largest: int) -> int:
    """The largest power of two up to `largest` that leaves at most an eighth of its columns unused, or 16.

    Half of it where that leaves none unused and is still wide.
    """
    block = largest
    while block > 16 and 8 * -(-width // block) * block > 9 * width:
        block //= 2
    return block // 2 if block >= 256 and width % block and width % (block // 2) == 0 else block


def cut(width: int, block: int) -> tuple[int, int]:
    """Full blocks of a width, and the size of one that follows them: half, where half is enough for what remains.

    Otherwise none follows, and what remains takes one more full block.
    """
    whole, rest = divmod(width, block)
    if rest and rest <= block // 2 and block >= NARROW:
        return whole, block // 2
    return whole + (rest > 0), block


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
