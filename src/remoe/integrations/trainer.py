"""Sparsity control under transformers' `Trainer`, TRL's `SFTTrainer` and loops of one's own."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from remoe.convert.relufy.model import RelufiedMixin
from remoe.errors import ConfigError
from remoe.integrations.fused_head import PenalisedFusedHead, has_fused_head
from remoe.routing.base import Router

if TYPE_CHECKING:
    from transformers import Trainer

NEEDED = "remoe.RemoeForCausalLM, or a model that remoe.relufy converted"


class SparsityCallback(TrainerCallback, ExportableState):
    """Moves lambda and the routers' own state once per optimiser step, and logs how they route.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[remoe.SparsityCallback()])

    The Trainer's log gets `sparsity` (S, Eq. 8), `lambda` and `load_max_over_mean` (tokens of a layer's busiest expert
    divided by its mean load, averaged over layers). They are in `trainer.state.log_history` and reach every callback
    after this one. TensorBoard and other `report_to` callbacks run before those of a user; use
    `SparsityCallback.attach(trainer)` to run first, so that they report these figures too.

    The model may be wrapped (PEFT, DDP, accelerate, `torch.compile`). lambda and the routers' state are part of a full
    model's weights. An adapter's checkpoint lacks them, so they are stored in `trainer_state.json` as well.

    A loop of one's own needs no callback:

        for batch in batches:
            for part in micro_batches(batch):
                model(**part, num_items_in_batch=targets(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            routed_module(model).update_routing()  # with a schedule and the smooth rule: lr_fraction=lr / peak

    Raises:
        ConfigError: when training begins, for a model without routers to steer; after the first step, if the loss of
            the trainer does not contain the penalty. A `compute_loss` of your own around a `RemoeForCausalLM` must add
            `routed_module(model).sparsity.loss_terms(output.routings).total` and divide the sum by the micro-batches of
            a step. Outputs of relufied models have no routings. When training begins, for a `router_aux_loss_coef` of
            the trainer that is not the model's.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._penalised_head: PenalisedFusedHead | None = None
        self._checked = False

    @classmethod
    def attach(cls, trainer: "Trainer") -> "SparsityCallback":
        """Adds the callback before all others, so that whatever reports the Trainer's log reports its figures too."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: object
    ) -> None:
        """Finds the routers, and restores their state where the run is resumed.

        What training that was broken off has left is undone: its forward pass, and the statistics of its last step.
        """
        self._remove_head()
        self._module = routed_module(model)
        self._module.sparsity.discard_statistics()
        self._checked = False
        _keep_coefficient(self._module, args)
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if isinstance(saved, list):
            raise ConfigError(f"the trainer has {len(saved)} {name}s: lambda would move {len(saved)} times a step")
        if saved is not None and state.global_step > 0:
            _restore(self._module, saved["attributes"].get("routing", {}))
        # The Trainer fills this entry whenever it saves, and fails where a checkpoint from elsewhere lacks it.
        state.stateful_callbacks[name] = self.state()
        if has_fused_head(self._module, args):
            self._penalised_head = PenalisedFusedHead(self._module, args)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: object,
    ) -> None:
        """Moves lambda by the statistics of the step's micro-batches, of all ranks."""
        module = self._module
        if not self._checked:
            sparsity = module.sparsity
            needed = sparsity._regularizer_sum > 0 and sparsity.coefficient > 0
            if not sparsity._tokens_L.any() or (needed and not sparsity.penalised):
                raise ConfigError(
                    f"the trainer's loss is not that of {type(module).__name__} (label_smoothing_factor and "
                    f"compute_loss_func bring their own): without the penalty in it sparsity cannot be controlled"
                )
            self._checked = True
        module.update_routing(lr_fraction=_lr_fraction(optimizer))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Adds sparsity, lambda and load to the log of a training step."""
        if self._module is None or not logs or "loss" not in logs:
            return
        figures = routing_figures(self._module)
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Leaves the model as it was found."""
        self._remove_head()

    def _remove_head(self) -> None:
        if self._penalised_head is not None:
            self._penalised_head.remove()
            self._penalised_head = None

    def state(self) -> dict[str, dict[str, object]]:
        """What `trainer_state.json` keeps: lambda and the routers' steered state, exactly."""
        routing = {} if self._module is None else {k: v.tolist() for k, v in _steered_state(self._module).items()}
        return {"args": {}, "attributes": {"routing": routing}}


def _lr_fraction(optimizer: torch.optim.Optimizer | None) -> float:
    """Present learning rate over its peak, which PyTorch's schedulers write into the groups; 1 where none did."""
    groups = getattr(optimizer, "param_groups", [])
    peaks = [(float(group["lr"]), float(group.get("max_lr", group.get("initial_lr", 0)))) for group in groups]
    return min(1.0, max((lr / peak for lr, peak in peaks if peak > 0), default=1.0))


def routed_module(model: nn.Module) -> nn.Module:
    """The module that has `sparsity` and `update_routing`, in whatever wrappers.

    Raises:
        ConfigError: when there is none.
    """
    for module in model.modules():
        own = module._modules.keys() | module.__dict__.keys()
        if "sparsity" in own and callable(getattr(module, "update_routing", None)):
            return module
    raise ConfigError(f"SparsityCallback needs {NEEDED}: {type(model).__name__} has no `sparsity` and `update_routing`")


def _keep_coefficient(module: nn.Module, args: TrainingArguments) -> None:
    """TRL writes its `router_aux_loss_coef` into the model's config, for a loss that our routers do not have."""
    given = getattr(args, "router_aux_loss_coef", None)
    own = 0.0 if isinstance(module, RelufiedMixin) else module.sparsity.router_aux_loss_coef
    if given is None or given == own:
        return
    module.config.router_aux_loss_coef = own
    raise ConfigError(
        f"router_aux_loss_coef of the trainer is {given}, but the model's loss has its own, {own}: "
        f"leave it out of {type(args).__name__}"
    )


@torch.no_grad()
def routing_figures(model: nn.Module) -> dict[str, float]:
    """Sparsity, lambda and load of the last update, by the names that the log gives them. One host synchronisation."""
    controller = routed_module(model).sparsity
    load_LE = controller.load_LE
    mean_L = load_LE.mean(dim=1)
    ratio_L = load_LE.amax(dim=1) / mean_L
    routed_L = mean_L > 0  # a layer without a pair has no busiest expert
    load = torch.where(routed_L, ratio_L, 0.0).sum() / routed_L.sum().clamp(min=1)
    sparsity, lam, load = torch.stack([controller.sparsity, controller.lam, load]).tolist()
    return {"sparsity": sparsity, "lambda": lam, "load_max_over_mean": load}


def _steered_state(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of the controller and of the routers: all that moves without gradients."""
    state = {f"sparsity.{name}": value for name, value in module.sparsity.state_dict().items()}
    for name, router in module.named_modules():
        if isinstance(router, Router):
            buffers = dict(router.named_buffers())
            state |= {f"{name}.{key}": value for key, value in router.state_dict().items() if key in buffers}
    return state


@torch.no_grad()
def _restore(module: nn.Module, saved: dict[str, object]) -> None:
    for name, buffer in _steered_state(module).items():
        if name not in saved:
            raise ConfigError(f"the checkpoint's trainer_state.json was written for another model: it lacks {name}")
        buffer.copy_(torch.tensor(saved[name], dtype=buffer.dtype))
