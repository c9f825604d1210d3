"""Experts in Triton kernels of this package: `triton_plan.py` and `triton_kernels.py`.

Forward: up projection with the gather of the tokens before it and SwiGLU and the gate behind it; down projection;
combine. Backward: gradient of the hidden activation with the gather before it and SwiGLU's derivative behind it; both
weight gradients, each with its gather; gradient of the rows; combine.

The combine adds a token's rows in the order of the experts, so there are no atomics, and two runs agree bit for bit.

The pairs are worked off in windows (`remoe.experts.windows`) that share their scratch memory. Thus memory is bounded
by the pairs that are wanted and not by those that are possible, but for the lists of pairs, and F / block numbers for
the gradient of each listed pair's gate. Only the device knows which windows have pairs: the kernels of the others end
at once, and the host does not launch them where the device has told it in time, but it never waits. What several
windows contribute to is rounded to the tensors' dtype once in each.

On devices with bulk copies of tensors (the "large" tiles of `remoe.experts.triton.launch`) the products' operands are
read by them, but for the tokens, which are gathered. An expert whose activations are not finite then also spoils the
weight gradient of the expert before it.

Legend: T tokens, D model width, F expert width, E experts, N listed pairs, C stored pairs, W rows of a window.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from remoe.experts.ops import empty_gradients
from remoe.experts.triton.launch import Launcher, interpreted
from remoe.experts.windows import windows
from remoe.matmul import aligned

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


def forward(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    pair_TE: Tensor | None,
    stored: int,
) -> tuple[Tensor, Tensor]:
    """Output and stored pre-activations; see `remoe.experts.ops`."""
    x_TD, gate_up_E2FD, down_EDF = map(aligned, (x_TD, gate_up_E2FD, down_EDF))
    F = down_EDF.shape[2]
    C = min(token_N.shape[0], stored)
    y_TD, pre_C2F = torch.empty_like(x_TD), x_TD.new_empty(C, 2 * F)
    if token_N.shape[0] == 0:
        return y_TD.zero_(), pre_C2F
    slices = windows(token_N.shape[0], C, *x_TD.shape, F)
    with torch.cuda.device_of(x_TD):
        launch = Launcher(x_TD, down_EDF, gate_N, token_N, count_E, pair_TE, slices)
        W = len(slices[0])
        hidden_WF, out_WD = x_TD.new_empty(W, F), x_TD.new_empty(W, x_TD.shape[1])
        for w, pairs in enumerate(slices):
            if launch.count.end_before(pairs):
                break
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
    pair_TE: Tensor | None,
    pre_C2F: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and gate; see `remoe.experts.ops`."""
    dy_TD, x_TD, gate_up_E2FD, down_EDF = map(aligned, (dy_TD, x_TD, gate_up_E2FD, down_EDF))
    dx_TD = torch.empty_like(x_TD)
    dgate_up_E2FD, ddown_EDF = empty_gradients(gate_up_E2FD, down_EDF, weights)
    dgate_N = torch.empty_like(gate_N, memory_format=torch.contiguous_format)
    if token_N.shape[0] == 0:
        return dx_TD.zero_(), dgate_up_E2FD.zero_(), ddown_EDF.zero_(), dgate_N
    D, F = down_EDF.shape[1:]
    slices = windows(token_N.shape[0], pre_C2F.shape[0], *x_TD.shape, F)
    with torch.cuda.device_of(x_TD):
        launch = Launcher(x_TD, down_EDF, gate_N, token_N, count_E, pair_TE, slices)
        W = launch.scratch_rows
        part = launch.gate_parts()
        dpre_W2F = x_TD.new_empty(W, 2 * F)
        # The hidden activation has been used when the gradient of the rows is written.
        shared = x_TD.new_empty(W * max(D, F))
        hidden_WF, dx_WD = shared[: W * F].view(W, F), shared[: W * D].view(W, D)
        for w, pairs in enumerate(slices):
            if launch.count.end_before(pairs):
                break
            pre, pre_first = pre_C2F, 0
            if pairs.stop > pre_C2F.shape[0]:
                pre, pre_first = dpre_W2F, pairs.start
                launch.up_projection(w, x_TD, gate_up_E2FD, pre, pre_first, pairs.stop, None)
            launch.hidden_gradient(w, dy_TD, down_EDF, pre, pre_first, dpre_W2F, hidden_WF, part)
            if weights:
                launch.weight_gradient(w, hidden_WF, dy_TD, ddown_EDF)
                launch.weight_gradient(w, dpre_W2F, x_TD, dgate_up_E2FD, up=True)
            launch.project(w, dpre_W2F, gate_up_E2FD, dx_WD, up=True)
            launch.combine(w, dx_WD, dx_TD)
        launch.sum_gate_gradient(part, dgate_N)
    return dx_TD, dgate_up_E2FD, ddown_EDF, dgate_N
