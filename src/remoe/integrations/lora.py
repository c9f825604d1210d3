"""PEFT's LoRA on experts, computed on the routed pairs: `lora_on_pairs(get_peft_model(model, config))`.

PEFT adds the adapters of `target_parameters` to the weights of all experts in every forward pass, and gets the
adapters' gradients from the gradient of these weights. Here they are products beside the frozen ones. PEFT keeps
everything else: the adapters, their names and files, merging, switching off.

Legend: E experts, I and O columns and rows of an expert's weight, r rank.
"""

import logging
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from remoe.convert.relufy.experts import NAME, is_plain_swiglu
from remoe.errors import ConfigError
from remoe.experts import Experts
from remoe.experts.adapters import PROJECTIONS, LowRank, adapting

_WITHOUT_ADAPTERS = ("triton", "sonic")  # "auto" takes another one on their devices

logger = logging.getLogger(__name__)


class ParamWrapper(lora.ParamWrapper):
    """PEFT's wrapper of an experts' weight, which hands the adapters over to the experts. Made by `lora_on_pairs`.

    PEFT knows its wrappers by the name of their class, hence the same name.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts with the active adapters, of which there may be several."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None or not active:
            return super().forward(x, *args, **kwargs)
        change = LowRank.sum([self._change(name) for name in active])
        with adapting(self.get_base_layer(), self.parameter_name, change):
            return self.base_layer(x, *args, **kwargs)

    def _change(self, adapter: str) -> LowRank:
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight  # (E r, I) and (O, r E)
        b_rEO = _ScaledTranspose.apply(b, self.scaling[adapter]).view(-1, self.num_experts, b.shape[0])
        return LowRank(a.view(self.num_experts, -1, a.shape[1]), b_rEO)


class _ScaledTranspose(torch.autograd.Function):
    """b^T times a number, contiguous as its gradient is: one pass over memory each."""

    @staticmethod
    def forward(ctx, b_IJ: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return torch.mul(b_IJ.t(), scale, out=b_IJ.new_empty(b_IJ.shape[::-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_JI: Tensor) -> tuple[Tensor, None]:
        return torch.mul(d_JI.t(), ctx.scale, out=d_JI.new_empty(d_JI.shape[::-1])), None


def lora_on_pairs(model: nn.Module) -> list[str]:
    """Lets experts compute with PEFT's adapters on their routed pairs, in outputs and gradients equal to PEFT's own.

    Experts that cannot are left to PEFT, and a warning says so: those that are merged before they run
    (router="lory"), those with backend "triton" or "sonic", and in models of transformers those with biases, transposed
    weights or an activation other than SiLU, or run by an implementation other than "remoe"
    (`model.set_experts_implementation`). An adapter that is added to the model later needs no second call.

    Args:
        model: with LoRA adapters on weights of experts (`target_parameters`), and with these weights frozen.

    Returns:
        The names of the adapted weights that are run on the pairs, as in the model without adapters.

    Raises:
        ConfigError: when the model has no such adapters. Later, in a forward pass, for weights that are trained
            themselves or quantised.
    """
    wrappers = {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, lora.ParamWrapper) and module.parameter_name in PROJECTIONS
    }
    if not wrappers:
        raise ConfigError(f"{type(model).__name__} has no LoRA adapters on gate_up_proj or down_proj of experts")
    left: dict[str, list[str]] = {}
    for weight, wrapper in wrappers.items():
        if (reason := _obstacle(wrapper.get_base_layer())) is None:
            wrapper.__class__ = ParamWrapper
        else:
            left.setdefault(reason, []).append(weight)
    for reason, weights in left.items():
        more = f" and {len(weights) - 1} more weights" if len(weights) > 1 else ""
        logger.warning("PEFT adds LoRA to %s%s: %s", weights[0], more, reason)
    return [weight for weight, wrapper in wrappers.items() if isinstance(wrapper, ParamWrapper)]


def _obstacle(experts: nn.Module) -> str | None:
    kind = type(experts).__name__
    if isinstance(experts, Experts):
        if type(experts) is not Experts:
            return f"{kind} are merged before they run"
        able = experts.backend not in _WITHOUT_ADAPTERS
        return None if able else f"the backend {experts.backend!r} cannot compute with adapters"
    if not hasattr(experts, "is_transposed"):
        return f"{kind} is not a module of experts"
    if not is_plain_swiglu(experts):
        return f"{kind} are not plain SwiGLU networks"
    chosen = getattr(experts.config, "_experts_implementation", None)
    return None if chosen == NAME else f"they are run by the implementation {chosen!r}"
