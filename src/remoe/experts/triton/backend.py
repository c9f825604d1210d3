"""Experts in Triton kernels of this package: `plan.py` and `kernels.py`.

Forward: up projection with the gather of the tokens before it and SwiGLU and the gate behind it; down projection;
combine. Backward: gradient of the hidden activation with the gather before it and SwiGLU's derivative behind it; both
weight gradients, each with its gather; gradient of the rows; combine.

The combine adds a token's rows in the order of the experts, so there are no atomics, and two runs agree bit for bit.

The pairs are processed in windows (`remoe.experts.windows`) that share their scratch memory. The target number of
pairs thus bounds the memory, not the number of possible ones; exceptions are the lists of pairs, and F / block numbers
for the gradient of each listed pair's gate. Only the device knows which windows have pairs: the kernels of empty
windows end at once, and the host skips their launch if the device has reported the count in time, but never
synchronises. A sum over several windows is rounded to the tensors' dtype once in each.

On devices with bulk copies of tensors (the "large" tiles of `remoe.experts.triton.launch`) the products' operands are
read by them, but for the tokens, which are gathered. An expert whose activations are not finite then also spoils the
weight gradient of the expert before it.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, W rows of a window.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remoe.experts.contract import Backend, Problem
from remoe.experts.triton.decode import decode
from remoe.experts.triton.launch import (
    FEW,
    GROUP,
    SUM_BLOCK,
    Tile,
    cut,
    device_tiles,
    interpreted,
    power_of_two,
)
from remoe.experts.windows import PairCount, windows
from remoe.matmul import aligned

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(device: torch.device, dtype: torch.dtype, d_model: int, d_ffn: int) -> str | None:
    """Why it cannot run there, or None when it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"no kernels for {dtype}"
    if interpreted():
        # It multiplies the bit patterns, and cuts off instead of rounding.
        return "Triton's interpreter does not compute in bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return "needs CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def forward(stored: int, *problem: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `Backend`."""
    p = _aligned(Problem._make(problem))
    y_TD, pre_C2F = torch.empty_like(p.x_TD), p.new_stored(stored)
    if p.token_N.shape[0] == 0:
        return y_TD.zero_(), pre_C2F
    (D, F), C = p.down_EDF.shape[1:], pre_C2F.shape[0]
    slices = windows(p.token_N.shape[0], C, p.x_TD.shape[0], D, F)
    with torch.cuda.device_of(p.x_TD):
        launch = Launcher(p, slices)
        W = len(slices[0])
        hidden_WF, out_WD = p.x_TD.new_empty(W, F), p.x_TD.new_empty(W, D)
        for w, pairs in enumerate(slices):
            if launch.count.end_before(pairs):
                break
            launch.up_projection(w, p.x_TD, p.gate_up_E2FD, pre_C2F, 0, C, hidden_WF)
            launch.project(w, hidden_WF, p.down_EDF, out_WD)
            launch.combine(w, out_WD, y_TD)
    return y_TD, pre_C2F


def backward(
    weights: bool, dy_TD: Tensor, pre_C2F: Tensor, *problem: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate; see `Backend`."""
    p, dy_TD = _aligned(Problem._make(problem)), aligned(dy_TD)
    dx_TD = torch.empty_like(p.x_TD)
    dgate_up_E2FD, ddown_EDF = p.new_weight_gradients(weights)
    dgate_N = torch.empty_like(p.gate_N, memory_format=torch.contiguous_format)
    if p.token_N.shape[0] == 0:
        return dx_TD.zero_(), dgate_up_E2FD.zero_(), ddown_EDF.zero_(), dgate_N
    D, F = p.down_EDF.shape[1:]
    slices = windows(p.token_N.shape[0], pre_C2F.shape[0], p.x_TD.shape[0], D, F)
    with torch.cuda.device_of(p.x_TD):
        launch = Launcher(p, slices)
        W = launch.scratch_rows
        part = launch.gate_parts()
        dpre_W2F = p.x_TD.new_empty(W, 2 * F)
        # The hidden activation has been used when the gradient of the rows is written.
        shared = p.x_TD.new_empty(W * max(D, F))
        hidden_WF, dx_WD = shared[: W * F].view(W, F), shared[: W * D].view(W, D)
        for w, pairs in enumerate(slices):
            if launch.count.end_before(pairs):
                break
            pre, pre_first = pre_C2F, 0
            if pairs.stop > pre_C2F.shape[0]:
                pre, pre_first = dpre_W2F, pairs.start
                launch.up_projection(w, p.x_TD, p.gate_up_E2FD, pre, pre_first, pairs.stop, None)
            launch.hidden_gradient(w, dy_TD, p.down_EDF, pre, pre_first, dpre_W2F, hidden_WF, part)
            if weights:
                launch.weight_gradient(w, hidden_WF, dy_TD, ddown_EDF)
                launch.weight_gradient(w, dpre_W2F, p.x_TD, dgate_up_E2FD, up=True)
            launch.project(w, dpre_W2F, p.gate_up_E2FD, dx_WD, up=True)
            launch.combine(w, dx_WD, dx_TD)
        launch.sum_gate_gradient(part, dgate_N)
    return dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N


def _aligned(p: Problem) -> Problem:
    return p._replace(x_TD=aligned(p.x_TD), gate_up_E2FD=aligned(p.gate_up_E2FD), down_EDF=aligned(p.down_EDF))


class Launcher:
    """The kernels over the windows of one list of pairs. Each method launches one kernel for window `w`."""

    def __init__(self, p: Problem, slices: list[range]) -> None:
        from remoe.experts.triton import kernels as triton_kernels
        from remoe.experts.triton import plan as triton_plan

        self.kernels = triton_kernels
        self.T, (self.E, self.D, self.F), self.W = p.x_TD.shape[0], p.down_EDF.shape, len(slices[0])
        self.tiles, self.processors = device_tiles(p.x_TD.device, p.x_TD.dtype, self.T <= FEW)
        self.described = self.tiles.can_describe(self.D, self.F)
        self.gate_N, self.token_N, pair_TE = p.gate_N.contiguous(), p.token_N.contiguous(), p.pair_TE
        self.count = PairCount(p.count_E, len(slices))
        self.rows = min(self.tiles.rows, max(16, power_of_two(self.T)))
        # Weight gradients read no further behind a window's last pair than hidden_gradient has written zeros.
        assert (
            not self.described
            or self.rows % max(self.tiles.gate_up_gradient.depth, self.tiles.down_gradient.depth) == 0
        )
        self.scratch_rows = self.W + self.rows  # of a window, and of the tile that its last pair is in
        self.max_tiles = -(-self.W // self.rows) + min(self.E, self.W)
        shapes = (4,), (self.max_tiles, 3), (self.E, 3)
        integers: dict[str, Any] = {"dtype": torch.int32, "device": p.x_TD.device}
        self.head, self.tile, self.span = (torch.empty(len(slices), *shape, **integers) for shape in shapes)
        triton_plan.plan_windows[len(slices), self.E](
            p.count_E.contiguous(), self.head, self.tile, self.span, self.W, self.max_tiles, self.E,
            EXPERTS=power_of_two(self.E), ROWS=self.rows, SLOTS=128,
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
        full, narrow = cut(self.F, columns // 2)
        grid, constants = self._by_rows(tile, columns, 2 * self.F)
        self.kernels.up_projection[grid](
            x_TD, *self._matrices(gate_up_E2FD, (columns // 2, tile.depth), (narrow, tile.depth)),
            self.gate_N, self.token_N, self.head, self.tile, pre, pre if hidden_WF is None else hidden_WF,
            w, self.W, self.max_tiles, first, end,
            D=self.D, F=self.F, HIDDEN=hidden_WF is not None, FULL=full, **constants,
        )  # fmt: skip

    def project(self, w: int, rows_WK: Tensor, weight: Tensor, out_WN: Tensor, up: bool = False) -> None:
        """Rows through `down`, or where `up` their gradient through `gate_up`."""
        K, N = rows_WK.shape[1], out_WN.shape[1]
        tile = self.tiles.rows_gradient if up else self.tiles.down
        columns = tile.block(N)
        block = (tile.depth, columns) if up else (columns, tile.depth)
        grid, constants = self._by_rows(tile, columns, N)
        self.kernels.project[grid](
            self._matrix(rows_WK, self.rows, tile.depth), self._matrix(weight, *block), self.head, self.tile, out_WN,
            w, self.W, self.max_tiles, K=K, N=N, TRANSPOSED=not up, **constants,
        )  # fmt: skip

    def combine(self, w: int, rows_WD: Tensor, out_TD: Tensor) -> None:
        """Each token's sum of rows."""
        block = min(2048, power_of_two(self.D))
        programs = min(self.T * -(-self.D // block), 8 * self.processors)  # as many as are resident at once
        self.kernels.combine[(programs,)](
            rows_WD, self.head, self.pair_TE, out_TD, w, self.W, self.T, self.E,
            D=self.D, EXPERTS=power_of_two(self.E), BLOCK=block,
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
        full, narrow = cut(self.F, columns)
        grid, constants = self._by_rows(tile, columns, self.F)
        self.kernels.hidden_gradient[grid](
            dy_TD, *self._matrices(down_EDF, (tile.depth, columns), (tile.depth, narrow)),
            self.gate_N, self.token_N, self.head, self.tile, pre, dpre_W2F, hidden_WF, part,
            w, self.W, self.max_tiles, pre_first, part.shape[1], D=self.D, F=self.F, FULL=full, **constants,
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
        height, columns = min(tile.rows, max(16, power_of_two(M))), tile.block(N)
        full, narrow = cut(M, height)
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

    def _by_rows(self, tile: Tile, columns: int, width: int) -> tuple[tuple[int], dict[str, int]]:
        """Grid and constants of a product whose tiles are rows of pairs times columns of a matrix of this width."""
        cuts = {"ROWS": self.rows, "COLUMNS": columns, "DEPTH": tile.depth, "GROUP": GROUP}
        grid = self._grid(tile, self.max_tiles * -(-width // columns))
        return grid, {"DESCRIBED": self.described} | cuts | tile.compiled

    def _grid(self, tile: Tile, items: int) -> tuple[int]:
        return (min(items, tile.programs * self.processors),)


BACKEND = Backend(obstacle, forward, backward, decode=decode)
