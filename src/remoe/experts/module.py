"""The weights of all experts of a layer, and the call that runs routed pairs through them.

Legend: T tokens, D model width, F expert width, E experts.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.experts.adapters import Adapters, take_adapters
from remoe.experts.contract import Problem
from remoe.experts.dispatch import ADAPTED, BACKENDS, OPERATORS, TRACED, check_backend, resolve_backend
from remoe.experts.naive import naive_experts
from remoe.experts.packed import BYTES, GROUP, is_packed, is_quantised, pack, unpack
from remoe.experts.windows import MIN_STORED_WINDOW, STORED_MULTIPLE
from remoe.matmul import linear
from remoe.routing.assignment import Assignment

# Pairs whose pre-activations are kept for the backward pass, as a multiple of the target. A layer with more active
# pairs, as in the dense stage, recomputes those of the others.
STORED_RATIO = 1.25


class Experts(nn.Module):
    """E SwiGLU feed-forward networks in the weight layout of transformers v5.

    Args:
        num_experts: E.
        d_model: D.
        d_ffn: F, the width of one expert.
        backend: "auto" or a name in BACKENDS. "cpu" and "grouped" run everywhere, "cpu" is the one for CPUs; "triton"
            and "sonic" need CUDA; "naive" is the specification, slow, for tests.
        k: target number of routed pairs per token, on average; bounds the memory for the backward pass to STORED_RATIO
            times as many. None keeps the pre-activations of all pairs.

    Raises:
        ConfigError: for an unknown backend; from `forward`, for one that cannot run on its input.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ffn: int,
        backend: str = "auto",
        k: float | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_ffn, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ffn))
        self.backend = check_backend(backend)
        self.k = k

    def forward(self, x_TD: Tensor, assignment: Assignment | None = None, gate_N: Tensor | None = None) -> Tensor:
        """Runs the routed pairs and sums them per token, or one network for every token.

        The only way in, because what offloads, shards or adapts weights wraps this method.

        Args:
            x_TD: (T, D).
            assignment: pairs over these T tokens and E experts. None: every token goes through expert 0 with gate one,
                without gathers.
            gate_N: their gates, by default the assignment's. Given as a tensor of its own so that transformers' tensor
                parallelism, which looks for such arguments, sums its gradient over the ranks.

        Returns:
            (T, D), zero for a token without an expert; in the autocast dtype under autocast, otherwise in x's.
        """
        adapters = take_adapters(self)
        if assignment is None:
            return self._run_first(x_TD, adapters)
        if gate_N is not None:
            assignment = replace(assignment, gate_N=gate_N)
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if is_quantised(gate_up):
            gate_up, down, assignment = _dequantised(gate_up, down, assignment, x_TD.dtype)
        x_TD, gate_up, down = autocast_tensors(x_TD, gate_up, down)
        stored = stored_pairs(x_TD, down.shape[0], self.k)
        return run_experts(x_TD, gate_up, down, assignment, self.backend, stored, adapters)

    def _run_first(self, x_TD: Tensor, adapters: Adapters | None) -> Tensor:
        gate_up_2FD: Tensor = self.gate_up_proj[0]
        down_DF: Tensor = self.down_proj[0]
        if is_packed(gate_up_2FD):
            gate_up_2FD, down_DF = unpack(gate_up_2FD, x_TD.dtype), unpack(down_DF, x_TD.dtype)
        if adapters is None:
            gate_TF, up_TF = linear(x_TD, gate_up_2FD).chunk(2, dim=-1)
            return linear(F.silu(gate_TF) * up_TF, down_DF)
        gate_TF, up_TF = adapters.gate_up.linear_of_first(x_TD, gate_up_2FD).chunk(2, dim=-1)
        return adapters.down.linear_of_first(F.silu(gate_TF) * up_TF, down_DF)

    @torch.no_grad()
    def pack(self) -> None:
        """Rounds the weights to 4 bits (`remoe.experts.packed`), for evaluation and generation.

        Raises:
            ConfigError: where 32 does not divide D or F.
        """
        packed = pack(self.gate_up_proj), pack(self.down_proj)
        self.gate_up_proj, self.down_proj = (nn.Parameter(weight, requires_grad=False) for weight in packed)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draws new weights from a normal distribution of this standard deviation; packed ones stay as they are."""
        if is_packed(self.gate_up_proj):
            return
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def extra_repr(self) -> str:
        E, D, F_ = self.down_proj.shape
        if is_packed(self.down_proj):
            F_ = F_ // BYTES * GROUP
        return f"num_experts={E}, d_model={D}, d_ffn={F_}, backend={self.backend}"


def stored_pairs(x_TD: Tensor, E: int, k: float | None) -> int:
    """How many pairs' pre-activations a layer keeps: STORED_RATIO k per token, or all where k is None."""
    per_token = E if k is None else min(E, STORED_RATIO * k)
    stored = math.ceil(per_token * x_TD.shape[0])
    if x_TD.device.type == "cuda" and not torch.compiler.is_compiling():  # a comparison would fix a symbolic T
        stored = max(stored, MIN_STORED_WINDOW)  # shorter windows would not be made
    return -(-stored // STORED_MULTIPLE) * STORED_MULTIPLE


def run_experts(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    assignment: Assignment,
    backend: str = "auto",
    stored: int | None = None,
    adapters: Adapters | None = None,
) -> Tensor:
    """Experts as a function of their weights, differentiable in these, the tokens and the gates.

    Args:
        x_TD, gate_up_E2FD, down_EDF: (T, D), (E, 2F, D), (E, D, F), of one dtype and on one device.
        assignment: pairs over these tokens and experts.
        backend: "auto" or a name in BACKENDS.
        stored: pairs whose pre-activations may be kept for the backward pass, which recomputes those of the others; all
            when None. "naive" and "sonic" keep all in any case.
        adapters: low-rank changes of the weights, which are then frozen: they get no gradients. On CUDA, "auto" takes
            "grouped"; "triton" and "sonic" cannot run them.

    Returns:
        (T, D); zero rows for tokens without an expert.

    Raises:
        ConfigError: for a backend that is unknown or cannot run on these tensors, and for tensors of several dtypes
            or devices.
    """
    backend = check_backend(backend)
    if backend == "naive":
        return naive_experts(x_TD, gate_up_E2FD, down_EDF, assignment, adapters)
    where = x_TD.device.type, x_TD.dtype, *down_EDF.shape[1:]
    if backend == "sonic" and adapters is None:
        function = BACKENDS[resolve_backend(backend, *where)].function
        assert function is not None
        return function(x_TD, gate_up_E2FD, down_EDF, assignment)
    a, gate_N = assignment, assignment.gate_N.to(torch.promote_types(x_TD.dtype, torch.float32))
    problem = Problem(x_TD, gate_up_E2FD, down_EDF, gate_N, a.token_N, a.count_E, a.pair_TE)
    _check(problem)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (*problem[:4], *(adapters or ())))):
        stored = 0
    stored = a.token_N.shape[0] if stored is None else stored
    if adapters is not None:
        if not torch.compiler.is_compiling():
            backend = resolve_backend(backend, *where, adapted=True)
        return ADAPTED.forward(backend, stored, *problem, *(t.to(x_TD.dtype) for t in adapters))[0]
    if torch.compiler.is_compiling():  # a graph chooses the backend when it runs
        return TRACED.forward(backend, stored, *problem)[0]
    return OPERATORS[resolve_backend(backend, *where)].forward(stored, *problem)[0]


def _check(p: Problem) -> None:
    if not p.x_TD.dtype == p.gate_up_E2FD.dtype == p.down_EDF.dtype:
        dtypes = f"{p.x_TD.dtype}, {p.gate_up_E2FD.dtype}, {p.down_EDF.dtype}"
        raise ConfigError(f"tokens and weights must have one dtype, but have {dtypes}")
    if not p.token_N.dtype == p.count_E.dtype == torch.int64:  # kernels read them as such
        raise ConfigError(f"token_N and count_E must be int64, but are {p.token_N.dtype} and {p.count_E.dtype}")
    devices = {t.device for t in p[:6]}
    if len(devices) > 1:
        raise ConfigError(f"tokens, weights and pairs must be on one device, but are on {sorted(map(str, devices))}")


def _dequantised(
    gate_up_E2FD: Tensor, down_EDF: Tensor, assignment: Assignment, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Assignment]:
    """Plain weights of the A active experts, at least one, and the same pairs over these experts."""
    active_A = assignment.count_E.nonzero().flatten()
    if not len(active_A):
        active_A = active_A.new_zeros(1)
    if is_packed(gate_up_E2FD):
        gate_up_A2FD, down_ADF = unpack(gate_up_E2FD[active_A], dtype), unpack(down_EDF[active_A], dtype)
    else:
        experts = active_A.tolist()
        gate_up_A2FD = torch.stack([gate_up_E2FD[expert].dequantize() for expert in experts])
        down_ADF = torch.stack([down_EDF[expert].dequantize() for expert in experts])
    expert_N = torch.searchsorted(active_A, assignment.expert_N)
    count_A = assignment.count_E[active_A]
    return gate_up_A2FD, down_ADF, replace(assignment, expert_N=expert_N, count_E=count_A, pair_TE=None)


def autocast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast a custom operator must be given tensors that are cast already."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
