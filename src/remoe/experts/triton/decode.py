"""A layer on a few tokens without gradients in two launches: `decode_kernels.py`.

A custom operator, so that `torch.compile` and CUDA graphs capture it: nothing in it waits for the device, and no size
depends on how many pairs are routed.

Legend: T tokens, D model width, F expert width, S width of the shared expert, E experts.
"""

import torch
from torch import Tensor

from remoe.experts.triton.launch import interpreted, power_of_two
from remoe.operators import operator_name

RULES = ("given", "relu", "softmax", "sigmoid", "cutoff")  # numbered as in `decode_kernels.py`
COLUMNS = 16  # of a tile, the fewest that a product may have: as many programs as possible read weights
PROGRAMS = 2  # of the first launch, for each multiprocessor
STAGE_BYTES = 24 * 1024  # that a stage of the pipeline may take of the shared memory


def _depth(rows: int, itemsize: int, most: int) -> int:
    """Numbers of each row that a step reads, so that a stage has room for them."""
    if interpreted():
        return 16  # several steps for small layers
    return max(16, min(most, power_of_two(STAGE_BYTES // (rows * itemsize) + 1) // 2))


def _decode(
    x_TD: Tensor, mask_T: Tensor | None, gate_TE: Tensor | None, rule: str, router_ED: Tensor | None,
    bias_E: Tensor | None, each_E: Tensor | None, k: int, scale: float, renormalize: bool,
    gate_up_E2FD: Tensor, down_EDF: Tensor, shared_gate_up: Tensor | None, shared_down: Tensor | None,
) -> Tensor:  # fmt: skip
    from remoe.experts.triton import decode_kernels as kernels

    (E, D, F), T, x_TD = down_EDF.shape, x_TD.shape[0], x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    if T == 0:
        return y_TD
    S = 0 if shared_down is None else shared_down.shape[-1]
    gate = x_TD.new_empty(T, E, dtype=torch.float32) if gate_TE is None else gate_TE.float().contiguous()
    hidden_ETF, hidden_TS = x_TD.new_empty(E, T, F), x_TD.new_empty(T, S)
    tokens, experts, itemsize = max(16, power_of_two(T)), max(16, power_of_two(E)), x_TD.element_size()
    router_size = itemsize if router_ED is None else max(itemsize, router_ED.element_size())
    sizes = {"E": E, "D": D, "F": F, "SHARED": S, "TOKENS": tokens, "EXPERTS": experts, "COLUMNS": COLUMNS}
    compiled = {"num_warps": 4, "num_stages": 3}
    items = E * -(-F // COLUMNS) + -(-S // COLUMNS)
    with torch.cuda.device_of(x_TD):
        processors = 3
        if not interpreted():
            processors = PROGRAMS * torch.cuda.get_device_properties(x_TD.device).multi_processor_count
        kernels.gates_and_hidden[(min(items, processors),)](
            x_TD, _or(mask_T, x_TD), _or(router_ED, x_TD), _or(bias_E, x_TD), _or(each_E, x_TD), gate_up_E2FD,
            _or(shared_gate_up, x_TD), gate, hidden_ETF, hidden_TS, T, scale,
            K=k, RULE=RULES.index(rule), RENORMALIZE=renormalize, BIAS=bias_E is not None, EACH=each_E is not None,
            MASK=mask_T is not None, DEPTH=_depth(tokens + 2 * COLUMNS, itemsize, 256),
            ROUTER_DEPTH=_depth(tokens + experts, router_size, 128), **sizes, **compiled,
        )  # fmt: skip
        kernels.down_and_sum[(-(-D // COLUMNS),)](
            gate, hidden_ETF, down_EDF, hidden_TS, _or(shared_down, x_TD), y_TD, T,
            DEPTH=_depth(tokens + COLUMNS, itemsize, 256), **sizes, **compiled,
        )  # fmt: skip
    return y_TD


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given in place of a tensor that it does not read."""
    return other if tensor is None else tensor.contiguous()


decode = torch.library.custom_op(
    operator_name("decode_triton"), _decode, mutates_args=(),
    schema="(Tensor x_TD, Tensor? mask_T, Tensor? gate_TE, str rule, Tensor? router_ED, Tensor? bias_E, Tensor? each_E,"
    " int k, float scale, bool renormalize, Tensor gate_up_E2FD, Tensor down_EDF, Tensor? shared_gate_up,"
    " Tensor? shared_down) -> Tensor",
)  # fmt: skip


@decode.register_fake
def _(x_TD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)
