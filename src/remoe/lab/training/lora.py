"""LoRA in a training run: PEFT's adapters on attention and experts, and the weights with the adapters merged in.

Legend: E experts.
"""

import torch
from torch import Tensor, nn

from remoe.errors import missing_extra
from remoe.lab.training.config import LoraOptions
from remoe.routing import Router

_EXPERTS = tuple(
    f"{module}.{weight}" for module in ("experts", "shared_expert") for weight in ("gate_up_proj", "down_proj")
)
_ADAPTER = "default"  # PEFT's name for the only one
_BASE, _OWN = ".base_layer", "lora_"  # in the names of an adapted model's tensors


def adapt(model: nn.Module, options: LoraOptions) -> None:
    """Freezes a model in place, but for its routers, and puts trainable adapters beside attention and experts.

    Args:
        model: of this package or relufied.
        options: with a rank of at least 1.

    Raises:
        ExtraError: when PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model

        from remoe.integrations.lora import lora_on_pairs
    except ModuleNotFoundError as error:
        raise missing_extra(error, "lora", "--lora.rank") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".self_attn." in name]
    experts = [name for name, weight in model.named_parameters() if name.endswith(_EXPERTS) and weight.ndim == 3]
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    adapter = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=linear, target_parameters=experts)
    inject_adapter_in_model(adapter, model)
    lora_on_pairs(model)
    for module in model.modules():
        if isinstance(module, Router):
            module.requires_grad_(True)  # otherwise lambda could not control the sparsity


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return _OWN in name


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes in an adapted model, by name: adapters, routers, and the buffers of the state dict."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trainable | buffers}


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have without adapters, whose changes are added to the weights."""
    from peft.tuners.lora import LoraLayer

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    merged = {
        _plain(name): tensor
        for name, tensor in model.state_dict().items()
        if not is_adapter(name) and _plain(name) not in tied
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}"
            merged[weight] = merged[weight] + module.get_delta_weight(_ADAPTER)
    return merged


def _plain(name: str) -> str:
    return name.replace(_BASE, "")
