"""Launches of the kernels in `triton_plan.py` and `triton_kernels.py`: tile sizes, grids and the tables of one call.

Tile sizes are a table and not found by trials on the first call: trials would wait for the device, delay the start,
and let two runs differ.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, W rows of a window.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remoe.experts.windows import PairCount

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


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
        return min(self.columns, max(16, _power_of_two(width))) if self.exact else _block(width, self.columns)


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
    "float32": Tiles(64, *[Tile(64, 32, 4, 2, 2, rows=64)] * 6),
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


class Launcher:
    """The kernels over the windows of one list of pairs. Each method launches one kernel for window `w`."""

    def __init__(
        self, x_TD: Tensor, down_EDF: Tensor, gate_N: Tensor, token_N: Tensor, count_E: Tensor, pair_TE: Tensor | None,
        slices: list[range],
    ) -> None:  # fmt: skip
        from remoe.experts.triton import kernels as triton_kernels
        from remoe.experts.triton import plan as triton_plan

        self.kernels = triton_kernels
        self.tiles, self.processors = _device(x_TD.device, x_TD.dtype, x_TD.shape[0] <= FEW)
        self.T, (self.E, self.D, self.F), self.W = x_TD.shape[0], down_EDF.shape, len(slices[0])
        self.described = self.tiles.can_describe(self.D, self.F)
        self.gate_N, self.token_N = gate_N.contiguous(), token_N.contiguous()
        self.count = PairCount(count_E, len(slices))
        self.rows = min(self.tiles.rows, max(16, _power_of_two(self.T)))
        # Weight gradients read no further behind a window's last pair than hidden_gradient has written zeros.
        assert (
            not self.described
            or self.rows % max(self.tiles.gate_up_gradient.depth, self.tiles.down_gradient.depth) == 0
        )
        self.scratch_rows = self.W + self.rows  # of a window, and of the tile that its last pair is in
        self.max_tiles = -(-self.W // self.rows) + min(self.E, self.W)
        shapes = (4,), (self.max_tiles, 3), (self.E, 3)
        integers = {"dtype": torch.int32, "device": x_TD.device}
        self.head, self.tile, self.span = (torch.empty(len(slices), *shape, **integers) for shape in shapes)
        triton_plan.plan_windows[len(slices), self.E](
            count_E.contiguous(), self.head, self.tile, self.span, self.W, self.max_tiles, self.E,
            EXPERTS=_power_of_two(self.E), ROWS=self.rows, SLOTS=128,
        )  # fmt: skip
        if pair_TE is None:
            pair_TE = torch.full((self.T, self.E), -1, **integers)
            triton_plan.place_pairs[self.max_tiles, len(slices)](
                self.token_N, self.head, self.tile, pair_TE, self.max_tiles, self.E, ROWS=self.rows
            )
        self.pair_TE = pair_TE

    def up_projection(
        self, w: int, x_TD: Tensor, gate_up_E2FD: Tensor, pre: Tensor, first: int, end: int, hidden_WF: Tensor | None
    ) -> None:
        """Pre-activations of the pairs before `end`, into `pre`, whose row 0 is the pair `first`; hidden activation."""
        tile, columns = self.tiles.up, self.tiles.up.block(2 * self.F)
        full, narrow = _cut(self.F, columns // 2)
        self._launch_rowwise(
            self.kernels.up_projection, tile, columns, 2 * self.F,
            x_TD, *self._matrices(gate_up_E2FD, (columns // 2, tile.depth), (narrow, tile.depth)),
            self.gate_N, self.token_N, self.head, self.tile, pre, pre if hidden_WF is None else hidden_WF,
            w, self.W, self.max_tiles, first, end,
            D=self.D, F=self.F, HIDDEN=hidden_WF is not None, FULL=full,
        )  # fmt: skip

    def project(self, w: int, rows_WK: Tensor, weight: Tensor, out_WN: Tensor, up: bool = False) -> None:
        """Rows through `down`, or where `up` their gradient through `gate_up`."""
        K, N = rows_WK.shape[1], out_WN.shape[1]
        tile = self.tiles.rows_gradient if up else self.tiles.down
        columns = tile.block(N)
        block = (tile.depth, columns) if up else (columns, tile.depth)
        self._launch_rowwise(
            self.kernels.project, tile, columns, N,
            self._matrix(rows_WK, self.rows, tile.depth), self._matrix(weight, *block), self.head, self.tile, out_WN,
            w, self.W, self.max_tiles, K=K, N=N, TRANSPOSED=not up,
        )  # fmt: skip

    def combine(self, w: int, rows_WD: Tensor, out_TD: Tensor) -> None:
        """Each token's sum of rows."""
        block = min(2048, _power_of_two(self.D))
        programs = min(self.T * -(-self.D // block), 8 * self.processors)  # as many as are resident at once
        self.kernels.combine[(programs,)](
            rows_WD, self.head, self.pair_TE, out_TD, w, self.W, self.T, self.E,
            D=self.D, EXPERTS=_power_of_two(self.E), BLOCK=block,
        )  # fmt: skip

    def gate_parts(self) -> Tensor:
        """(parts, N) float32, uninitialised: partial sums of the gates' gradients, which `hidden_gradient` fills."""
        parts = -(-self.F // self.tiles.hidden_gradient.block(self.F))
        return torch.empty(parts, len(self.token_N), dtype=torch.float32, device=self.token_N.device)

    def hidden_gradient(
        self, w: int, dy_TD: Tensor, down_EDF: Tensor, pre: Tensor, pre_first: int,
        dpre_W2F: Tensor, hidden_WF: Tensor, part: Tensor,
    ) -> None:  # fmt: skip
        """Gradients of pre-activations and gates, the latter in parts, and the gated hidden activation again."""
        tile, columns = self.tiles.hidden_gradient, self.tiles.hidden_gradient.block(self.F)
        full, narrow = _cut(self.F, columns)
        self._launch_rowwise(
            self.kernels.hidden_gradient, tile, columns, self.F,
            dy_TD, *self._matrices(down_EDF, (tile.depth, columns), (tile.depth, narrow)),
            self.gate_N, self.token_N, self.head, self.tile, pre, dpre_W2F, hidden_WF, part,
            w, self.W, self.max_tiles, pre_first, part.shape[1], D=self.D, F=self.F, FULL=full,
        )  # fmt: skip

    def sum_gate_gradient(self, part: Tensor, dgate_N: Tensor) -> None:
        """The gates' gradient from its parts, once all windows have theirs; zero behind the pairs."""
        parts, listed = part.shape
        self.kernels.sum_gate_gradient[(-(-listed // SUM_BLOCK),)](
            part, self.count.total, dgate_N, listed, PARTS=parts, BLOCK=SUM_BLOCK
        )

    def weight_gradient(self, w: int, rows: Tensor, tokens: Tensor, out_EMN: Tensor, up: bool = False) -> None:
        """Gradient of `gate_up` from dpre and x where `up`, else of `down` from hidden and dy; zeros without pairs."""
        E, M, N = out_EMN.shape
        tile = self.tiles.gate_up_gradient if up else self.tiles.down_gradient
        height, columns = min(tile.rows, max(16, _power_of_two(M))), tile.block(N)
        full, narrow = _cut(M, height)
        self.kernels.weight_gradient[self._grid(tile, E * -(-M // height) * -(-N // columns))](
            *self._matrices(rows, *((tile.depth, width) for width in ((height, narrow) if up else (columns, columns)))),
            tokens, self.token_N, self.head, self.span, out_EMN, w, self.W, E,
            M=M, N=N, UP=up, DESCRIBED=self.described, FULL=full,
            ROWS=height, COLUMNS=columns, DEPTH=tile.depth, GROUP=GROUP, **tile.compiled,
        )  # fmt: skip

    def _matrices(self, tensor: Tensor, *blocks: tuple[int, int]) -> "list[Tensor | TensorDescriptor]":
        # Of each size of block; equal ones are one.
        matrix = {block: self._matrix(tensor, *block) for block in blocks}
        return [matrix[block] for block in blocks]

    def _matrix(self, tensor: Tensor, height: int, width: int) -> "Tensor | TensorDescriptor":
        """What a kernel reads blocks of this size from: the matrix of a tensor's last dimension."""
        if not self.described:
            return tensor
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(tensor.flatten(0, -2), [height, width])

    def _launch_rowwise(self, kernel, tile: Tile, columns: int, width: int, *args, **constants) -> None:
        kernel[self._grid(tile, self.max_tiles * -(-width // columns))](
            *args, **constants, DESCRIBED=self.described,
            ROWS=self.rows, COLUMNS=columns, DEPTH=tile.depth, GROUP=GROUP, **tile.compiled,
        )  # fmt: skip

    def _grid(self, tile: Tile, items: int) -> tuple[int]:
        return (min(items, tile.programs * self.processors),)


@cache
def _device(device: torch.device, dtype: torch.dtype, few: bool) -> tuple[Tiles, int]:
    """Tiles, for few tokens where `few`, and the number of multiprocessors."""
    if interpreted():
        return TILES["interpreted"], 3  # few, so that a program has several tiles
    properties = torch.cuda.get_device_properties(device)
    large = properties.shared_memory_per_block_optin >= 200 * 1024
    name = "float32" if dtype == torch.float32 else ("large, few" if few else "large") if large else "small"
    return TILES[name], properties.multi_processor_count


def _block(width: int, largest: int) -> int:
    """The largest power of two up to `largest` that leaves at most an eighth of its columns unused, or else 16.

    Half of it where that leaves none unused and is still wide.
    """
    block = largest
    while block > 16 and 8 * -(-width // block) * block > 9 * width:
        block //= 2
    return block // 2 if block >= 256 and width % block and width % (block // 2) == 0 else block


def _cut(width: int, block: int) -> tuple[int, int]:
    """Full blocks of a width, and the size of one that follows them: half, where half is enough for what remains.

    Else none follows, and what remains takes one more full block.
    """
    whole, rest = divmod(width, block)
    if rest and rest <= block // 2 and block >= NARROW:
        return whole, block // 2
    return whole + (rest > 0), block


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
