"""ReLU routing in models of megatron-core (0.16), through its own seam `MoESubmodules(router=...)`.

`remoe.convert.megatron` is something else: it reads and writes checkpoints of the authors' code.

Legend: T tokens, D model width, E experts, L layers.
"""

from typing import Any

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.routing.assignment import Routing
from remoe.routing.relu import ReLURouter
from remoe.sparsity import SparsityController

# Settings of a TransformerConfig that our router does not have, and the value that means "unused".
UNUSED = {
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_force_load_balancing": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_apply_probs_on_input": False,
    "moe_enable_routing_replay": False,
    "add_bias_linear": False,
    "mtp_num_layers": None,
    "moe_layer_freq": 1,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
}


class MegatronRouters:
    """Builds the ReLU routers of one model of megatron-core, and steers their lambda.

        routers = MegatronRouters(rule="sign")
        submodules = MoESubmodules(experts=experts, router=routers)  # in the layer's spec
        ...
        optimizer.step()
        routers.update()  # once per optimiser step, on every rank

    The target number of experts per token is `moe_router_topk`. Lambda is not in the model's state dict: save and load
    `routers.controller.state_dict()` beside it.

    Args:
        load_balance: see `ReLURouter`.
        options: of `SparsityController`.

    Attributes:
        controller: the `SparsityController` of all layers; None before the first router is built.
    """

    def __init__(self, *, load_balance: bool = True, **options: Any) -> None:
        self.load_balance, self.options = load_balance, options
        self.controller: SparsityController | None = None

    def __call__(self, /, *, config: Any, pg_collection: Any = None) -> "MegatronReLURouter":
        """A layer's router, as megatron-core's `RouterBuilder`; raises ConfigError as `check_config` does."""
        check_config(config)
        if self.controller is None:
            sizes = (config.num_layers, config.num_moe_experts, config.moe_router_topk)
            self.controller = SparsityController(*sizes, **self.options)
        return MegatronReLURouter(config, self.controller, self.load_balance)

    def update(self, *, lr_fraction: float = 1.0) -> None:
        """Moves lambda by the statistics of the step over all ranks; see `SparsityController.update`."""
        if self.controller is None:
            raise ConfigError("no router has been built: give this object to MoESubmodules(router=...)")
        self.controller.update(lr_fraction=lr_fraction)


class MegatronReLURouter(ReLURouter):
    """`ReLURouter` with megatron-core's `RouterInterface`; `MegatronRouters` builds it."""

    def __init__(self, config: Any, controller: SparsityController, load_balance: bool) -> None:
        sizes = (config.hidden_size, config.num_moe_experts, config.moe_router_topk)
        super().__init__(*sizes, load_balance=load_balance)
        self.layer_number: int | None = None
        self.per_token_loss = config.calculate_per_token_loss
        self.opens = controller.rule == "smooth"
        self._controller = (controller,)  # in a tuple, because lambda is of all layers, and none of this module's
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.data = self.weight.data.to(config.params_dtype)
        self.weight.sequence_parallel = False

    def set_layer_number(self, layer_number: int) -> None:
        """Tells the router its layer, counted from 1 over all pipeline stages."""
        self.layer_number = layer_number

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and routing map of tokens, and in training the penalty in the backward pass of the gates.

        Args:
            input: (S, B, D).
            padding_mask: (S, B) bool, true for padding, as megatron-core's own router uses it.

        Returns:
            (T, E) float32 gates, zero where there is no pair, and (T, E) bool.
        """
        mask_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        routing = self.route(input.reshape(-1, input.shape[-1]), mask_T)
        gate_TE, map_TE = routing.gate_TE, routing.gate_TE.detach() != 0
        if self.training and torch.is_grad_enabled():
            from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

            gate_TE = MoEAuxLossAutoScaler.apply(gate_TE, self.penalty_term(routing))
        return gate_TE, map_TE

    def route(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        """The layer's routing; in training it is counted, once also where activations are recomputed."""
        routing = super().forward(x_TD, mask_T)
        if self.training and torch._C._current_graph_task_id() == -1:
            self._count(routing)
        return routing

    def penalty_term(self, routing: Routing) -> Tensor:
        """0-dim float32: this layer's part of lambda * L_reg (Eq. 6), and of what opens and lifts experts."""
        controller = self._on(routing.regularizer.device)
        L = len(controller.dead_steps_L)
        controller.penalised = True
        term = controller.coefficient * routing.regularizer / (1 if controller.sum_layers else L)
        if routing.closed_loss is not None:
            term = term + controller.opening * routing.closed_loss / L
        if routing.extra_loss is not None:
            term = term + routing.extra_loss / L
        # With this setting megatron-core divides all gradients by the number of tokens.
        return term * routing.num_tokens if self.per_token_loss else term

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        controller = self._on(routing.regularizer.device)
        if self.layer_number is None:
            raise ConfigError("the router does not know its layer: call set_layer_number, as MoELayer does")
        layer = self.layer_number - 1
        controller._pairs_LE[layer] += routing.count_E
        controller._tokens_L[layer] += routing.num_tokens
        layers = 1 if controller.sum_layers else len(controller.dead_steps_L)
        controller._regularizer_sum += routing.regularizer / layers
        if layer == 0:
            controller._passes += 1

    def _on(self, device: torch.device) -> SparsityController:
        (controller,) = self._controller
        return controller if controller.lam.device == device else controller.to(device)


def check_config(config: Any) -> None:
    """Raises ConfigError for settings of a `TransformerConfig` under which pairs would be lost or settings ignored.

    In megatron-core 0.16.1 the flex dispatcher takes `topk` of the gates and so cuts a token's further experts. The
    all-to-all dispatcher takes the number of pairs to be T * moe_router_topk, unless `moe_expert_capacity_factor` is
    set: then it counts them. That factor's value has no effect here, because dropping is a task of the router.
    """
    dispatcher = config.moe_token_dispatcher_type
    if dispatcher == "flex":
        raise ConfigError(
            "moe_token_dispatcher_type 'flex' keeps only moe_router_topk experts of a token, and ReLU routing may give "
            "it more: use 'alltoall' or 'allgather'"
        )
    if dispatcher not in ("alltoall", "allgather"):
        raise ConfigError(f"moe_token_dispatcher_type {dispatcher!r} is unknown: use 'alltoall' or 'allgather'")
    if dispatcher == "alltoall" and config.moe_expert_capacity_factor is None:
        raise ConfigError(
            "moe_token_dispatcher_type 'alltoall' assumes moe_router_topk pairs per token: set "
            "moe_expert_capacity_factor to 1.0, with which it counts the pairs; nothing is dropped"
        )
    if config.moe_pad_expert_input_to_capacity:
        raise ConfigError("moe_pad_expert_input_to_capacity drops pairs, which ReLU routing does not allow")
    for name, unused in UNUSED.items():
        if (value := getattr(config, name, unused)) != unused:
            raise ConfigError(f"{name} = {value} cannot be used with ReLU routing: leave it at {unused}")
