"""Experts in Triton kernels of this package: `triton_kernels.py`.

Forward: up projection with the gather of the tokens before it and SwiGLU and the gate behind it; down projection;
combine. Backward: gradient of the hidden activation with the gather before it and SwiGLU's derivative behind it; both
weight gradients, each with its gather; gradient of the rows; combine.

The combine adds a token's rows in the order of the experts, so there are no atomics, and two runs agree bit for bit.

The pairs are worked off in windows of a fixed number of rows that share their scratch memory. How many windows there
could be follows from the length of the list, how many there are only the device knows: the kernels of the others end
at once. Thus memory is bounded by the pairs that are wanted and not by those that are possible, and the host never
waits. What several windows contribute to is rounded to the tensors' dtype once in each; in training that is one more
rounding at most, until more pairs are active than wanted.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, W rows of a window.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from remoe.experts.triton_launch import Launcher, interpreted
from remoe.gemm import aligned

# Windows that the stored pairs take: the more, the less scratch memory and the more kernels.
STORED_WINDOWS = 2
# Rows, so that a machine has enough to do with one window.
MIN_WINDOW = 16384
MIN_STORED_WINDOW = 4096  # shorter ones would be too many over the whole list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
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


def windows(pairs: int, stored: int, tokens: int) -> list[range]:
    """Slices of the list of pairs to be worked off one after the other.

    All but the last are of one length. One of them ends with the stored pairs, because a window that reaches beyond
    them is computed again as a whole; only where they are few, longer windows cost less than many.
    """
    count = min(STORED_WINDOWS, max(1, round(stored / MIN_WINDOW)))
    if stored < MIN_STORED_WINDOW:
        rows = max(0 if stored else 4 * tokens, MIN_WINDOW)
    else:
        rows = stored if stored % count else stored // count
    return [range(first, min(first + rows, pairs)) for first in range(0, pairs, rows)]


def forward(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    stored: int,
) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `remoe.experts.ops`."""
    x_TD, gate_up_E2FD, down_EDF = map(aligned, (x_TD, gate_up_E2FD, down_EDF))
    F = down_EDF.shape[2]
    C = min(token_N.shape[0], stored)
    y_TD, pre_C2F = torch.empty_like(x_TD), x_TD.new_empty(C, 2 * F)
    if token_N.shape[0] == 0:
        return y_TD.zero_(), pre_C2F
    slices = windows(token_N.shape[0], C, x_TD.shape[0])
    with torch.cuda.device_of(x_TD):
        launch = Launcher(x_TD, down_EDF, gate_N, token_N, count_E, slices)
        W = len(slices[0])
        hidden_WF, out_WD = x_TD.new_empty(W, F), x_TD.new_empty(W, x_TD.shape[1])
        for w in range(len(slices)):
            launch.up_projection(w, x_TD, gate_up_E2FD, pre_C2F, 0, C, hidden_WF)
            launch.project(w, hidden_WF, down_EDF, out_WD)
            launch.combine(w, out_WD, y_TD)
    return y_TD, pre_C2F


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pre_C2F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate; see `remoe.experts.ops`."""
    dy_TD, x_TD, gate_up_E2FD, down_EDF = map(aligned, (dy_TD, x_TD, gate_up_E2FD, down_EDF))
    dx_TD, dgate_up_E2FD, ddown_EDF = (torch.empty_like(t) for t in (x_TD, gate_up_E2FD, down_EDF))
    dgate_N = torch.empty_like(gate_N, memory_format=torch.contiguous_format)
    if token_N.shape[0] == 0:
        return dx_TD.zero_(), dgate_up_E2FD.zero_(), ddown_EDF.zero_(), dgate_N
    D, F = down_EDF.shape[1:]
    slices = windows(token_N.shape[0], pre_C2F.shape[0], x_TD.shape[0])
    with torch.cuda.device_of(x_TD):
        launch = Launcher(x_TD, down_EDF, gate_N, token_N, count_E, slices)
        W = len(slices[0])
        part = launch.gate_parts()
        dpre_W2F = x_TD.new_empty(W, 2 * F)
        # The hidden activation has been used when the gradient of the rows is written.
        shared = x_TD.new_empty(W * max(D, F))
        hidden_WF, dx_WD = shared[: W * F].view(W, F), shared[: W * D].view(W, D)
        for w, pairs in enumerate(slices):
            pre, pre_first = pre_C2F, 0
            if pairs.stop > pre_C2F.shape[0]:
                pre, pre_first = dpre_W2F, pairs.start
                launch.up_projection(w, x_TD, gate_up_E2FD, pre, pre_first, pairs.stop, None)
            launch.hidden_gradient(w, dy_TD, down_EDF, pre, pre_first, dpre_W2F, hidden_WF, part)
            launch.weight_gradient(w, dy_TD, hidden_WF, ddown_EDF)
            launch.weight_gradient(w, dpre_W2F, x_TD, dgate_up_E2FD, up=True)
            launch.project(w, dpre_W2F, gate_up_E2FD, dx_WD, up=True)
            launch.combine(w, dx_WD, dx_TD)
        launch.sum_gate_gradient(part, dgate_N)
    return dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N
