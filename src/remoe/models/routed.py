"""What every ReMoE model with a loss has: a sparsity controller, the penalty, and the compute dial."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from remoe.errors import ConfigError
from remoe.layer import MoE
from remoe.models.configuration_remoe import RemoeConfig
from remoe.sparsity import SparsityController

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DIAL = ("gate_threshold", "max_experts")


def build_controller(config: RemoeConfig, layers: Sequence[MoE]) -> SparsityController:
    """The controller of a model's layers; where lambda has no part in the loss, it only measures."""
    return SparsityController.of(
        layers,
        **config.sparsity,
        regularizer_normalization=config.regularizer_normalization,
        router_aux_loss_coef=config.router_aux_loss_coef,
    )


def keep_statistics_local(model: nn.Module) -> None:
    """Tells DistributedDataParallel, which copies rank 0's buffers to all before a pass, to leave the sums alone.

    It asks only the module that it is given: around a wrapper of the model (PEFT's, for one) the micro-batches of a
    step but the last must run under its `no_sync`, as they do in transformers' Trainer.
    """
    names = [f"sparsity.{name}" for name in model.sparsity.statistics()]
    model._ddp_params_and_buffers_to_ignore = names


def add_routing(output: ModelOutput, as_items: bool, **values: object) -> ModelOutput:
    """The output with further attributes, which are items of it too where `as_items` holds: in training mode.

    Otherwise items would be in the way: transformers' pipelines take each apart by sequence, and its tests and
    `torch.export` expect tensors.
    """
    for name, value in values.items():
        if as_items:
            output[name] = value
        else:
            object.__setattr__(output, name, value)  # that of ModelOutput would make it an item
    return output


def check_dial(model: nn.Module) -> None:
    """Raises ConfigError for a model that has no gates for a gate threshold or a cap to leave out."""
    if not isinstance(model, Dialled):
        raise ConfigError(f"gate threshold and cap need a ReMoE or a relufied model, not a {type(model).__name__}")
    model._routed_layers()


def dial_of_tokens(tokens: Tensor, **given: float | Tensor | None) -> dict[str, Tensor]:
    """Those of `gate_threshold` and `max_experts` that are given, as (B, S) tensors.

    Args:
        tokens: (B, S) or (B, S, D), the tokens that they are for.
        given: by name, one number, (B,) or (B, S).

    Raises:
        ConfigError: for values out of range, or neither one number nor one for each row or each token.
    """
    dial = {}
    for name, value in given.items():
        if value is None:
            continue
        B, S = tokens.shape[:2]
        least, dtype = (0, torch.float32) if name == "gate_threshold" else (1, torch.int64)
        value_B = torch.as_tensor(value)
        if dtype is torch.int64 and value_B.is_floating_point():
            raise ConfigError(f"{name} must be whole numbers, but is {value}")
        if value_B.shape not in ((), (B,), (B, S)):
            raise ConfigError(
                f"{name} must be one number or {B}, one for each row, or ({B}, {S}), one for each token, but has shape "
                f"{(*value_B.shape,)}"
            )
        on_host = value_B.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would be waited for
        if on_host and not (value_B >= least).all():
            raise ConfigError(f"{name} must be at least {least}, but is {value_B.tolist()}")
        value_B = value_B.to(tokens.device, dtype).clamp(min=least)  # a copy
        dial[name] = (value_B if value_B.ndim == 2 else value_B.reshape(-1, 1)).expand(B, S)
    return dial


class Dialled:
    """A mixin for models whose layers have a `gate_threshold` and a `max_experts`; so have `forward` and `generate`."""

    def set_gate_threshold(self, threshold: float) -> None:
        """Leaves out, at evaluation, every expert whose gate is at most `threshold`: less compute, a higher loss.

        `remoe eval --sweep-threshold` shows what it costs. Not saved with the model; 0 takes it back.

        Raises:
            ConfigError: for a negative threshold, or a model whose tokens are not routed.
        """
        if not threshold >= 0:
            raise ConfigError(f"a gate threshold must not be negative, but is {threshold}")
        for layer in self._routed_layers():
            layer.gate_threshold = threshold

    def set_max_experts(self, max_experts: int | None) -> None:
        """Executes, at evaluation, only a token's `max_experts` experts with the largest gates; None takes it back.

        Raises:
            ConfigError: for less than one expert, or a model whose tokens are not routed.
        """
        if max_experts is not None and max_experts < 1:
            raise ConfigError(f"max_experts must be at least 1, but is {max_experts}")
        for layer in self._routed_layers():
            layer.max_experts = max_experts

    def _routed_layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def _expand_inputs_for_generation(self, *args, **kwargs) -> tuple[Tensor, dict[str, object]]:
        """As transformers does, which repeats tensors for each beam: one without dimensions stays as it is."""
        for_all = {}
        for name in DIAL:
            if isinstance(kwargs.get(name), Tensor | list | tuple):
                kwargs[name] = torch.as_tensor(kwargs[name])
                if kwargs[name].ndim == 0:
                    for_all[name] = kwargs.pop(name)
        input_ids, kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        return input_ids, kwargs | for_all


class RoutedModel(Dialled):
    """A mixin for models with `config`, `model` (a `RemoeModel`) and `sparsity`."""

    config: RemoeConfig
    sparsity: SparsityController
    _keep_in_fp32_modules_strict = {"sparsity"}  # lambda moves in small steps

    def update_routing(self, group: "ProcessGroup | None" = None, *, lr_fraction: float = 1.0) -> None:
        """Moves lambda and the routers' own state by the statistics since the last call; no host sync.

        Args:
            group, lr_fraction: as in `SparsityController.update`.
        """
        self.sparsity.layers = tuple(layer.mlp for layer in self.model.layers)  # one may have been replaced or wrapped
        self.sparsity.update(group, lr_fraction=lr_fraction)

    def _routed_layers(self) -> list[nn.Module]:
        self.config.check_gates()
        return [layer.mlp for layer in self.model.layers]
