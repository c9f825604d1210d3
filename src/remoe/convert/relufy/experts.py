"""Our ragged experts in transformers' experts interface: `model.set_experts_implementation("remoe")`.

A pair whose weight is zero, or whose index is E, is not executed. Plain SwiGLU experts run on `remoe.experts`; those
with biases, transposed weights or another activation run one after the other, by their own activation.

Legend: T tokens, D model width, F expert width, E experts, K experts listed per token.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from remoe.decoding import decode_by_gates
from remoe.errors import ConfigError
from remoe.experts import autocast_tensors, run_experts, stored_pairs
from remoe.experts.adapters import take_adapters
from remoe.routing.assignment import Assignment

NAME = "remoe"
K = "remoe_k"  # an attribute of experts modules: target experts per token


def remoe_experts_forward(self: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Runs the experts module `self` of a transformers model.

    Args:
        x_TD: (T, D).
        index_TK: (T, K) int64, the experts of each token; E for none.
        weight_TK: (T, K), what their outputs are multiplied by.

    Returns:
        (T, D), in x's dtype.

    Raises:
        ConfigError: for experts with a norm of their own.
    """
    gate_TE, plain = _gates(index_TK, weight_TK, self.num_experts), is_plain_swiglu(self)
    adapters = take_adapters(self)
    if plain and adapters is None:
        y_TD = decode_by_gates(x_TD, gate_TE, self.gate_up_proj, self.down_proj)
        if y_TD is not None:
            return y_TD
    most = index_TK.shape[0] * min(index_TK.shape[1], self.num_experts)
    assignment = Assignment.from_gates(gate_TE, gate_TE != 0, max_pairs=most)
    if plain:
        tensors = autocast_tensors(x_TD, self.gate_up_proj, self.down_proj)
        # A relufied model lists every expert of every token, and wants few: it says how many.
        k = getattr(self, K, index_TK.shape[1])
        stored = stored_pairs(x_TD, self.num_experts, k)
        return run_experts(*tensors, assignment, stored=stored, adapters=adapters).to(x_TD.dtype)
    if getattr(self, "has_post_expert_norm", False):
        raise ConfigError(f"{type(self).__name__} has a norm after each expert, which is not supported")
    return _one_by_one(self, x_TD, assignment)


def is_plain_swiglu(experts: nn.Module) -> bool:
    """Whether an experts module computes what `remoe.experts` does: silu(gate) * up, without biases."""
    activation = getattr(experts, "act_fn", None)
    silu = activation is F.silu or isinstance(activation, (nn.SiLU, type(ACT2FN["silu"])))
    own_gate = type(experts)._apply_gate is not _default_apply_gate
    special = experts.has_bias or experts.is_transposed or getattr(experts, "has_post_expert_norm", False)
    return silu and experts.has_gate and experts.is_concatenated and not own_gate and not special


def _gates(index_TK: Tensor, weight_TK: Tensor, E: int) -> Tensor:
    """(T, E) float32."""
    # The last column takes the entries that name no expert.
    zeros = weight_TK.new_zeros(weight_TK.shape[0], E + 1, dtype=torch.float32)
    return zeros.scatter_add(1, index_TK, weight_TK.float())[:, :E]


def _one_by_one(experts: nn.Module, x_TD: Tensor, assignment: Assignment) -> Tensor:
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    y_TD = torch.zeros_like(x_TD)
    starts = [0, *assignment.count_E.cumsum(0).tolist()]
    for e, (start, end) in enumerate(itertools.pairwise(starts)):
        if start == end:
            continue
        token_r, gate_r = assignment.token_N[start:end], assignment.gate_N[start:end]
        hidden = _linear(experts, up_name, e, x_TD[token_r])
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        out_rD = _linear(experts, "down_proj", e, hidden) * gate_r[:, None]
        y_TD = y_TD.index_add(0, token_r, out_rD.to(y_TD.dtype))
    return y_TD


def _linear(experts: nn.Module, name: str, e: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[e]
    bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, remoe_experts_forward)
