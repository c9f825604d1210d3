"""What every router shares: its interface, its shape checks and its logits in float32.

Legend: T tokens, D model width, E experts.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.routing.assignment import Routing


class Router(nn.Module, ABC):
    """Turns tokens into a `Routing`.

    Args:
        d_model: D.
        num_experts: E.
        k: wanted active experts per token, 1 <= k <= E.

    Attributes:
        steered: lambda of the sparsity controller multiplies the regulariser; else it has a constant coefficient.
        causal: at evaluation no token's routing depends on a later token.
        looks_ahead: in training it does, at least in some steps: the training loss does not compare.
        merges: experts are merged into one network instead of routing tokens to some of them.

    Raises:
        ConfigError: when k is not in 1..E.
    """

    steered = False
    causal = True
    looks_ahead = False
    merges = False

    def __init__(self, d_model: int, num_experts: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ConfigError(f"k must be between 1 and the number of experts, but k = {k} and E = {num_experts}")
        self.d_model = d_model
        self.num_experts = num_experts
        self.k = k

    @abstractmethod
    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, *, ids_T: Tensor | None = None, seq_len: int | None = None
    ) -> Routing:
        """Routes tokens.

        Args:
            x_TD: (T, D), sequences one after the other.
            mask_T: (T,) bool, false for padding, which is in no pair and in no statistic.
            ids_T: (T,) int64 token ids; only "hash" reads them.
            seq_len: tokens of a sequence, a divisor of T; T when None. For routers that look at neighbouring tokens.
        """

    def reset_parameters(self, std: float) -> None:
        """Draws new weights from a normal distribution of this standard deviation; scales start at their own value."""

    def reset_state(self) -> None:
        """Sets what is steered and not learned to its start, by torch's initialisers, as `reset_parameters` does."""

    def update_state(self, load_E: Tensor, statistic_E: Tensor) -> None:
        """Moves what is steered and not learned; once per optimiser step.

        Args:
            load_E: (E,) float32, share of the step's tokens that each expert got.
            statistic_E: (E,) float32, mean of `Routing.statistic_E` over the step's forward passes.
        """

    @torch.no_grad()
    def step(self, load_E: Tensor, statistic_E: Tensor, seen: Tensor) -> None:
        """`update_state`, but without effect where no token was seen (0-dim bool). No host synchronisation."""
        before = [buffer.clone() for buffer in self.buffers()]
        device = before[0].device if before else seen.device  # a model's layers may lie on several
        load_E, statistic_E, seen = load_E.to(device), statistic_E.to(device), seen.to(device)
        self.update_state(load_E, statistic_E)
        for buffer, old in zip(self.buffers(), before, strict=True):
            buffer.copy_(torch.where(seen, buffer, old))

    def _apply(self, fn, recurse: bool = True) -> "Router":
        """Moves to devices as any module, but keeps steered state in float32: its steps are small."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        keep_float32(self, before)
        return self

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, k={self.k}"


class LinearRouter(Router):
    """A router with one logit per expert: x W, or x W + b."""

    def __init__(self, d_model: int, num_experts: int, k: int, *, bias: bool = False) -> None:
        super().__init__(d_model, num_experts, k)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) router logits, float32 (float64 for float64 input), whatever autocast says."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            bias_E = None if self.bias is None else self.bias.to(dtype)
            if x_TD.dtype == dtype:
                return F.linear(x_TD, self.weight.to(dtype), bias_E)
            logits_TE = _Float32Product.apply(x_TD, self.weight)
            return logits_TE if bias_E is None else logits_TE + bias_E

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Float32Product(torch.autograd.Function):
    """x W^T in float32 of 16-bit tokens, which are kept for the backward pass as they are, not as float32.

    A GPU multiplies bfloat16 by bfloat16 exactly and sums in float32; the gradient of the logits, which has more
    digits, goes through it as the sum of two bfloat16 numbers, which leaves out 1 part in 2^17.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.in_bfloat16 = x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16
        if ctx.in_bfloat16:
            return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
        return x_TD.float() @ weight_ED.float().t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        dx, dweight = ctx.needs_input_grad
        if ctx.in_bfloat16:
            high_TE = dlogits_TE.bfloat16()
            parts_T2E = torch.cat((high_TE, (dlogits_TE - high_TE).bfloat16()), dim=1)
            dx_TD = parts_T2E @ weight_ED.repeat(2, 1) if dx else None
            if not dweight:
                return dx_TD, None
            dweight_2ED = torch.mm(parts_T2E.t(), x_TD, out_dtype=torch.float32).unflatten(0, (2, -1))
            return dx_TD, dweight_2ED.sum(dim=0).bfloat16()
        dx_TD = (dlogits_TE @ weight_ED.float()).to(x_TD.dtype) if dx else None
        return dx_TD, (dlogits_TE.t() @ x_TD.float()).to(weight_ED.dtype) if dweight else None


def keep_float32(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Undoes what a cast did to a module's own buffers: their values as they were, on the device they are on now."""
    for name, buffer in before.items():
        moved = getattr(module, name)
        if moved.dtype != buffer.dtype:
            setattr(module, name, buffer.to(moved.device))


def largest(score_TE: Tensor, k: int) -> Tensor:
    """(T, E) bool: the k largest scores of each token."""
    chosen = score_TE.topk(k, dim=1).indices
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, chosen, True)


def unmasked(active_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """`active_TE` without the rows of padding."""
    return active_TE if mask_T is None else active_TE & mask_T[:, None]


def check_gate_scale(gate_scale: float) -> float:
    """A constant factor on the gates, checked.

    Raises:
        ConfigError: when it is not positive.
    """
    if not gate_scale > 0:
        raise ConfigError(f"gate_scale must be above zero, but is {gate_scale}")
    return gate_scale
