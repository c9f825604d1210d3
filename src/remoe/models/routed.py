"""What every ReMoE model with a loss has: a sparsity controller, the penalty, and the compute dial."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.layer import MoE
from remoe.models.configuration_remoe import RemoeConfig
from remoe.routing import Routing
from remoe.sparsity import SparsityController


def build_controller(config: RemoeConfig) -> SparsityController:
    """The controller of a model's layers; where lambda has no part in the loss, it only measures."""
    one_expert = not config.routes_pairs
    return SparsityController(
        config.num_hidden_layers,
        1 if one_expert else config.num_experts * config.granularity,
        1 if one_expert else config.num_experts_per_tok * config.granularity,
        rule=config.sparsity_rule if config.steered else "none",
        lambda_init=config.lambda_init,
        alpha=config.lambda_alpha,
        fast_start=config.lambda_fast_start,
        sum_layers=config.regularizer_normalization == "official",
    )


def keep_statistics_local(model: nn.Module) -> None:
    """Tells DistributedDataParallel, which copies rank 0's buffers to all before a pass, to leave the sums alone.

    It asks only the module that it is given: around a wrapper of the model (PEFT's, for one) the micro-batches of a
    step but the last must run under its `no_sync`, as they do in transformers' Trainer.
    """
    names = [f"sparsity.{name}" for name in model.sparsity.statistics()]
    model._ddp_params_and_buffers_to_ignore = names


class RoutedModel:
    """A mixin for models with `config`, `model` (a `RemoeModel`) and `sparsity`."""

    config: RemoeConfig
    sparsity: SparsityController

    @property
    def regularizer_coefficient(self) -> Tensor | float:
        """What multiplies the regulariser in the loss: lambda for "relu" and its kin, a constant for other routers.

        Whoever asks for it in training has a loss with the penalty in it: `sparsity.penalised` is true until the next
        update.
        """
        if self.training:
            self.sparsity.penalised = True
        if self.config.steered:
            return self.sparsity.lam.clone()  # a copy: `update` changes lambda in place
        return self.config.router_aux_loss_coef

    def update_routing(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Moves lambda and the routers' own steered state by the statistics since the last call; no host sync.

        Args:
            group: as in `SparsityController.update`.
        """
        self.sparsity.update([layer.mlp for layer in self.model.layers], group)

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

    def _routed_layers(self) -> list[MoE]:
        if not self.config.routes_pairs:
            raise ConfigError(f"router {self.config.router!r} routes no pairs: there are no gates to leave out")
        return [layer.mlp for layer in self.model.layers]

    def _regularizer(self, routings: Sequence[Routing]) -> Tensor:
        total = torch.stack([routing.regularizer.to(self.sparsity.lam.device) for routing in routings]).sum()
        if self.config.steered and self.config.regularizer_normalization == "paper":
            return total / len(routings)
        return total

    def _extra_loss(self, routings: Sequence[Routing]) -> Tensor | float:
        """Mean over the layers of what their routers add to a training loss as it is; 0 where they add nothing."""
        if not self.training or routings[0].extra_loss is None:
            return 0.0
        return torch.stack([routing.extra_loss.to(self.sparsity.lam.device) for routing in routings]).mean()
