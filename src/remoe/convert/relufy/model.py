"""A transformers model with ReLU routers in the place of its TopK routers: its class, its router, its loading.

Legend: B batch, S sequence, T tokens, D model width, E experts.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from remoe.convert.relufy import experts as experts_function
from remoe.decoding import limits
from remoe.errors import ConfigError
from remoe.models.loss import is_padding_mask
from remoe.models.routed import DIAL, Dialled, add_routing, dial_of_tokens, keep_statistics_local
from remoe.models.saving import umask_decides
from remoe.routing import ReLURouter, Routing
from remoe.routing.replay import Replay
from remoe.sparsity import SparsityController

ROUTER_NAMES = ("gate", "router")
PREFIX = "Relufied"
MODEL_TYPE = "relufied"
# lambda starts where its penalty can be felt: fine-tuning is short, and there is no dense stage to wait for.
STEERING = {"rule": "smooth", "fast_start": True}


def load_relufied(folder: str | Path, **options: object) -> PreTrainedModel:
    """A model that `relufy` converted and `save_pretrained` wrote.

    Args:
        folder: the folder.
        options: those of transformers' `from_pretrained`, `dtype` for instance.

    Raises:
        ConfigError: when the folder holds something else.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no model: config.json is missing")
    data = json.loads(path.read_text())
    if data.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{folder} holds no relufied model, but one of type {data.get('model_type')!r}")
    config = relufied_config(data)
    options.setdefault("experts_implementation", experts_function.NAME)
    return class_of(config).from_pretrained(folder, config=config, **options)


def is_relufied(folder: str | Path) -> bool:
    """Whether a folder holds a relufied model."""
    path = Path(folder) / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("model_type") == MODEL_TYPE


def relufied_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a relufied model, of transformers' own class, from what its `config.json` has."""
    kind = values["relufied"]["model_type"]
    return CONFIG_MAPPING[kind].from_dict(values | {"model_type": kind})


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the relufied model that a configuration describes."""
    settings = config.relufied
    return relufied_class(getattr(importlib.import_module(settings["module"]), settings["class"]))


class _Context:
    """What the routers of one model share during a forward pass: mask of padding, compute dial, their routings."""

    def __init__(self) -> None:
        self.mask_BS: Tensor | None = None
        self.dial: dict[str, Tensor] = {}  # (B, S) each, of this pass alone
        self.routings: dict[int, Routing] | None = None  # by layer, while a forward pass is recorded

    def __deepcopy__(self, memo: dict) -> "_Context":
        return self  # a router copied alone, as by PEFT, still belongs to its model; a copied model makes its own


class RelufiedRouter(ReLURouter):
    """A ReLU router that answers as transformers' routers do: (logits, weights (T, E), indices (T, E))."""

    replay: Replay | None = None  # see `remoe.models.replay`
    gate_threshold: float = 0.0  # these two as `MoE` has them
    max_experts: int | None = None

    def __init__(self, context: _Context, layer: int, d_model: int, num_experts: int, k: int, load_balance: bool):
        super().__init__(d_model, num_experts, k, load_balance=load_balance, bias=True)
        self.context = context
        self.layer = layer

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, self.d_model)
        recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        # If a part of the model is called on its own, the mask is still that of the last whole forward pass.
        mask_BS = self.context.mask_BS if self.context.routings is not None or recomputed else None
        # Blocks that see other tokens than the batch's, as some multimodal ones do, are counted without a mask.
        fits = mask_BS is not None and mask_BS.numel() == x_TD.shape[0]
        mask_T = mask_BS.flatten().to(x_TD.device) if fits else None
        routing = super().forward(x_TD, mask_T)
        if self.replay is not None:
            routing = self.replay.apply(self.layer, self, routing, mask_T)
        threshold, cap = (self._dial(name, x_TD) for name in ("gate_threshold", "max_experts"))
        if not self.training and limits(threshold, cap):
            routing = routing.pruned(threshold, cap)
        if self.context.routings is not None:  # recomputation is not recorded: it would keep its activations
            self.context.routings[self.layer] = routing
        # Every expert is listed: ours leave out those of weight zero, the model's own run them without effect.
        index_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        return routing.logits_TE, routing.gate_TE.to(hidden_states.dtype), index_TE

    def _dial(self, name: str, x_TD: Tensor) -> Any:
        """The setting of this name: (T,) where the forward pass has its own, otherwise the router's."""
        value_BS = self.context.dial.get(name)
        if value_BS is None:
            return getattr(self, name)
        if value_BS.numel() != x_TD.shape[0]:
            raise ConfigError(
                f"{name} of one call needs routers that see all tokens of the batch: set it for the model"
            )
        return value_BS.flatten().to(x_TD.device)


class _Recompute:
    """A function for activation checkpointing whose layers meet the mask of their own forward pass, not the last."""

    def __init__(self, context: _Context, checkpoint: Callable) -> None:
        self.context, self.checkpoint = context, checkpoint

    def __call__(self, function: Callable, *args: object, **kwargs: object) -> object:
        context, mask_BS = self.context, self.context.mask_BS

        def run(*args: object, **kwargs: object) -> object:
            before, context.mask_BS = context.mask_BS, mask_BS
            try:
                return function(*args, **kwargs)
            finally:
                context.mask_BS = before

        return self.checkpoint(run, *args, **kwargs)


def recompute_with_masks(model: nn.Module, context: _Context | None) -> None:
    """Makes the layers that are computed again do so with the context's masks; None takes it back."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            plain = function.checkpoint if isinstance(function, _Recompute) else function
            module._gradient_checkpointing_func = plain if context is None else _Recompute(context, plain)


class RelufiedMixin(Dialled):
    """What `relufy` adds to a transformers model: the penalty in its loss, steering, saving, the compute dial."""

    sparsity: SparsityController
    converted: type[PreTrainedModel]  # the class that it was of

    def __reduce__(self) -> tuple:
        return _new, (self.converted,), self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._routing_context = _Context()
        for module in self.modules():
            if isinstance(module, RelufiedRouter):
                module.context = self._routing_context
        recompute_with_masks(self, self._routing_context)

    def update_routing(
        self, group: "torch.distributed.ProcessGroup | None" = None, *, lr_fraction: float = 1.0
    ) -> None:
        """Moves lambda by the statistics since the last call; once per optimiser step.

        Args:
            group, lr_fraction: as in `SparsityController.update`.
        """
        self.sparsity.update(group, lr_fraction=lr_fraction)

    def save_pretrained(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """As transformers does, with a model type that only `remoe.load_relufied` knows: no TopK model will load it."""
        with _written_as_relufied(self.config), umask_decides(save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)

    def _set_gradient_checkpointing(self, *args: object, **kwargs: object) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        recompute_with_masks(self, self._routing_context)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # the last one: a model within this one has passed by its routers
            for ours in self.modules():
                if isinstance(ours, SparsityController):
                    ours.reset()
                elif isinstance(ours, RelufiedRouter):
                    ours.reset_parameters(_initial_std(self.config))

    @contextmanager
    def recorded_routings(self, inputs: Mapping[str, object]) -> Iterator[list[Routing]]:
        """A list that holds, after the block, the routing of each layer in the forward pass that ran in it.

        Args:
            inputs: of that pass: `attention_mask` and `input_ids` or `inputs_embeds`, to know padding;
                `gate_threshold` and `max_experts` as `RemoeModel` takes them.

        Raises:
            ConfigError: for a gate threshold or cap that is out of range or has another shape.
        """
        context, mask = self._routing_context, inputs.get("attention_mask")
        ids = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        tells_padding = is_padding_mask(mask) and ids is not None
        context.mask_BS = mask[:, -ids.shape[1] :].bool() if tells_padding else None
        dial = {name: inputs[name] for name in DIAL if inputs.get(name) is not None}
        if dial and ids is None:
            raise ConfigError("a gate threshold or cap of one call needs input_ids or inputs_embeds")
        before, routings = context.routings, {}
        context.dial = dial_of_tokens(ids, **dial) if dial else {}
        context.routings = routings
        found: list[Routing] = []
        try:
            yield found
            found.extend(routings[layer] for layer in sorted(routings))
        finally:
            context.routings, context.dial = before, {}

    def observe(self, routings: Sequence[Routing]) -> None:
        """Counts a training step's routings for lambda.

        Raises:
            ConfigError: for reentrant recomputation, in which routers get no gradients.
        """
        if any(not routing.regularizer.requires_grad and self._trains_routers() for routing in routings):
            raise ConfigError("recomputation of a relufied model needs use_reentrant=False")
        self.sparsity.observe(routings)

    def _routed_layers(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, RelufiedRouter)]

    def _trains_routers(self) -> bool:
        return torch.is_grad_enabled() and any(router.weight.requires_grad for router in self._routed_layers())


def _initial_std(config: PreTrainedConfig) -> float:
    return getattr(config.get_text_config(), "initializer_range", 0.02)


@contextmanager
def _written_as_relufied(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, the config has our model type, in its file and in what is uploaded."""
    cls = type(config)
    config.__class__ = type(cls.__name__, (cls,), {"model_type": MODEL_TYPE, "__module__": cls.__module__})
    try:
        yield
    finally:
        config.__class__ = cls


@functools.cache
def relufied_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of relufied models of a class."""
    signature = inspect.signature(cls.forward)

    class Relufied(RelufiedMixin, cls):
        converted = cls
        _keep_in_fp32_modules_strict = set(cls._keep_in_fp32_modules_strict or ()) | {"sparsity"}

        def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
            super().__init__(config, *args, **kwargs)
            replace_routers(self, config.relufied)

        @functools.wraps(cls.forward)
        def forward(self, *args: object, **kwargs: object) -> object:
            dial = {name: kwargs.pop(name, None) for name in DIAL}
            given = signature.bind(self, *args, **kwargs).arguments
            given = given | given.get("kwargs", {})
            with self.recorded_routings(given | dial) as routings:
                output = super().forward(*args, **kwargs)
            if self.training:
                self.observe(routings)
            labels, items = given.get("labels"), given.get("num_items_in_batch")
            if labels is None:
                return output if isinstance(output, tuple) else add_routing(output, False, routings=tuple(routings))
            shifted = given.get("shift_labels")
            targets = labels[:, 1:] if shifted is None else shifted
            share = 1.0 if items is None else (targets != -100).sum() / items
            lm_loss = output[0] if isinstance(output, tuple) else output.loss
            terms = self.sparsity.loss_terms(routings, share)
            loss = lm_loss + terms.total.to(lm_loss.device) if self.training else lm_loss
            if isinstance(output, tuple):
                return (loss, *output[1:])
            output.loss = loss
            # As `RemoeForCausalLM` has them, but never items: transformers knows the class of the output.
            return add_routing(output, False, lm_loss=lm_loss, reg_loss=terms.regularizer, routings=tuple(routings))

        forward.__signature__ = _with_dial(signature)  # `generate` asks it which arguments there are

    Relufied.__name__ = Relufied.__qualname__ = PREFIX + cls.__name__
    Relufied.__module__ = cls.__module__  # transformers looks up there whether experts can be chosen
    return Relufied


def _with_dial(signature: inspect.Signature) -> inspect.Signature:
    dial = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in DIAL]
    return signature.replace(parameters=sorted([*signature.parameters.values(), *dial], key=lambda one: one.kind))


def _new(cls: type[PreTrainedModel]) -> PreTrainedModel:
    """A relufied model without anything in it, for pickle, which cannot name a class made at run time."""
    relufied = relufied_class(cls)
    return relufied.__new__(relufied)


def mixture_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The TopK routers of a transformers model by name, in the order of the layers.

    Raises:
        ConfigError: when there is none, or one of another kind or quantised; naming the module.
    """
    routers = {}
    for name, block in model.named_modules():
        children = dict(block.named_children())
        if "experts" not in children:
            continue
        router_name = next((n for n in ROUTER_NAMES if n in children), None)
        if router_name is None or not hasattr(children["experts"], "is_transposed"):
            raise ConfigError(
                f"{name} ({type(block).__name__}) is not a mixture of transformers' `gate` or `router` / `experts` kind"
            )
        router = children[router_name]
        for part in router.parameters():
            if not part.is_floating_point() or hasattr(part, "quant_state") or hasattr(part, "qdata"):
                raise ConfigError(f"{name}.{router_name} is quantised; load the model without quantising its routers")
        if type(router) is nn.Linear:
            raise ConfigError(f"{name}.{router_name} is a plain linear layer: its block routes in a way of its own")
        routers[f"{name}.{router_name}"] = router
    if not routers:
        raise ConfigError(f"{type(model).__name__} has no mixture of experts")
    return routers


def replace_routers(model: PreTrainedModel, settings: dict) -> None:
    """Gives a model new ReLU routers and a controller.

    Args:
        model: of a class that `relufied_class` made.
        settings: `num_experts`, `k` and `load_balance`.
    """
    context = _Context()
    routers = mixture_routers(model)
    E, k = settings["num_experts"], settings["k"]
    ours = []
    for layer, (name, router) in enumerate(routers.items()):
        parameter = next(router.parameters())
        d_model = parameter.shape[-1] if parameter.ndim == 2 else model.config.get_text_config().hidden_size
        with torch.device(parameter.device):
            new = RelufiedRouter(context, layer, d_model, E, k, settings["load_balance"])
            new.reset_parameters(_initial_std(model.config))
        ours.append(new.to(parameter.dtype))
        model.set_submodule(name, new)
        block = model.get_submodule(name.rpartition(".")[0])
        setattr(block.experts, experts_function.K, k)
    with torch.device(parameter.device):
        model.sparsity = SparsityController.of(ours, **STEERING)
    keep_statistics_local(model)
    model._routing_context = context
    recompute_with_masks(model, context)
