"""TRL's `SFTTrainer`, from version 1 on, takes log-probabilities from a head of its own and not the model's loss.

It patches the model's `forward`, calls the transformer without its head, and sums the log-probabilities into a loss
that knows nothing of lambda. Here the penalty joins the log-probabilities: the same amount at each target, so that it
comes out of the trainer's sum as `RemoeForCausalLM.forward` would have added it, whatever the normalisation,
accumulation and scaling.
"""

from functools import wraps

import torch
from torch import nn
from transformers import TrainingArguments

from remoe.errors import ConfigError
from remoe.models.modeling_remoe import RemoeForCausalLM


def has_fused_head(module: nn.Module, args: TrainingArguments) -> bool:
    """Whether this is a ReMoE model whose forward pass TRL's `SFTTrainer` may have replaced."""
    supervised = any(cls.__name__ == "SFTConfig" for cls in type(args).__mro__)
    return supervised and isinstance(module, RemoeForCausalLM) and "forward" in module.__dict__


class PenalisedFusedHead:
    """Puts statistics and penalty back into a patched forward pass; `remove` takes them out again.

    Args:
        model: whose `forward` a trainer has patched.
        args: the trainer's; `loss_type` must sum the log-probabilities as they are.

    Raises:
        ConfigError: for a loss that weights the log-probabilities.
    """

    def __init__(self, model: RemoeForCausalLM, args: TrainingArguments) -> None:
        if getattr(args, "loss_type", "nll") == "dft":
            raise ConfigError("loss_type='dft' weights each target, the penalty with it; choose loss_type='nll'")
        self._model = model
        self._patched = model.forward
        self._routings = None
        self._hook = model.base_model.register_forward_hook(self._keep_routings)
        model.forward = wraps(self._patched)(self._forward)

    def remove(self) -> None:
        """Restores the forward pass of before."""
        self._hook.remove()
        self._model.forward = self._patched

    def _keep_routings(self, module: nn.Module, args: tuple, output: object) -> None:
        self._routings = output.routings

    def _forward(self, *args: object, **kwargs: object) -> object:
        model = self._model
        outputs = self._patched(*args, **kwargs)
        routings, self._routings = self._routings, None
        if getattr(outputs, "log_probs", None) is None:
            return outputs  # the model's own forward pass, which has done all this
        if model.training:
            model.sparsity.observe(routings)
        penalty = model.regularizer_coefficient * model._regularizer(routings)
        extra = [routing.extra_loss for routing in routings if routing.extra_loss is not None]
        if model.training and extra:
            penalty = penalty + torch.stack(extra).mean()
        outputs.log_probs = outputs.log_probs - penalty * outputs.label_mask
        return outputs
