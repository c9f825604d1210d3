"""Experts by sonic-moe (arXiv 2512.14080), which brings its own forward and backward pass.

It runs only where the package `sonicmoe` is installed and the device is of compute capability 9.0 or 10.0; elsewhere
`obstacle` says what is missing. Its lists have exactly as many entries as there are pairs, so each call waits for the
device once to learn that number, and what it stores for the backward pass grows with it. Its products are tuned by
trial for every number of pairs that they have not met yet (quack-kernels 0.3.11), and ReLU routing brings another with
each step: it is for loads that stay, such as TopK's and a benchmark's. It cannot be traced by `torch.compile`.

Legend: T tokens, D model width, F expert width, E experts, R routed pairs.
"""

import inspect
from importlib.util import find_spec

import torch
from torch import Tensor

from remoe.experts.contract import Backend
from remoe.experts.naive import naive_experts
from remoe.routing.assignment import Assignment


def obstacle(device: torch.device, dtype: torch.dtype, d_model: int, d_ffn: int) -> str | None:
    """Why it cannot run there, or None when it can."""
    if device.type != "cuda":
        return "needs CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"no kernels for {dtype}"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "needs compute capability 9.0 or 10.0"
    if d_model * dtype.itemsize % 16 or d_ffn * dtype.itemsize % 16:
        return f"rows of {d_model} and {d_ffn} numbers in {dtype} are not multiples of 16 bytes"
    if find_spec("sonicmoe") is None:
        return "sonicmoe is not installed (pip install sonic-moe)"
    try:
        from sonicmoe import moe_general_routing_inputs
    except Exception as error:  # its import compiles and loads libraries; whatever fails there, it cannot run
        return f"sonicmoe cannot be imported: {error}"
    if "concat_layout" not in inspect.signature(moe_general_routing_inputs).parameters:
        return "sonicmoe is too old: it takes gate and up projections only with alternating rows"
    return None


def sonic_experts(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, assignment: Assignment) -> Tensor:
    """Runs the routed pairs and sums them per token; differentiable.

    Args:
        x_TD: (T, D), bfloat16 or float16.
        gate_up_E2FD: (E, 2F, D), the gate projection's F rows before the up projection's.
        down_EDF: (E, D, F).
        assignment: the routed pairs.

    Returns:
        (T, D); zero rows for tokens without an expert.
    """
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    R = int(assignment.count_E.sum())
    if R == 0:
        return naive_experts(x_TD, gate_up_E2FD, down_EDF, assignment)
    # It wants the pairs by token.
    token_R, order_R = assignment.token_N[:R].sort(stable=True)
    y_TD, _ = moe_general_routing_inputs(
        x_TD.contiguous(),
        assignment.gate_N[:R].index_select(0, order_R),
        token_R.to(torch.int32),
        assignment.expert_N[:R].index_select(0, order_R).to(torch.int32),
        gate_up_E2FD.permute(1, 2, 0),
        None,
        down_EDF.permute(1, 2, 0),
        None,
        assignment.num_experts,
        torch.cuda.current_stream(x_TD.device).cuda_stream,
        ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
    )
    return y_TD


BACKEND = Backend(obstacle, function=sonic_experts)
