"""`relufy`: the TopK routers of a mixture-of-experts model replaced by ReLU routers, in place.

Transformers' mixtures all have a router, `gate` or `router`, that returns (logits, weights, indices), and an experts
module that takes the last two. The router becomes ReLU(x W + b), fitted to the weights that the old one gave on sample
text; the experts run by ours. Attention, shared experts and dense layers are not touched.

Legend: B batch, S sequence, T tokens, D model width, E experts, K experts per token.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from remoe.convert import experts_function
from remoe.convert.calibration import Batch, GateRecorder, as_batch, fit_relu_gates, language_model_loss
from remoe.errors import ConfigError
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import ReLURouter, Routing
from remoe.sparsity import SparsityController

ROUTER_NAMES = ("gate", "router")
PREFIX = "Relufied"
MODEL_TYPE = "relufied"
MAX_TOKENS = 16_384
# lambda starts where its penalty can be felt: fine-tuning is short, and there is no dense stage to wait for.
STEERING = {"rule": "smooth", "fast_start": True}


@dataclass(frozen=True)
class RelufyReport:
    """What a conversion did, on its own sample text.

    Attributes:
        routers: names of the replaced modules.
        num_experts, k: E, and the experts per token that the TopK routers gave and that lambda will steer to.
        loss_before, loss_after: cross-entropy of the sample in nats per token.
        experts_per_token: of each ReLU router, mean right after the conversion.
        gate_error: of each router, squared error of the gates as a part of their square.
    """

    routers: tuple[str, ...]
    num_experts: int
    k: int
    loss_before: float
    loss_after: float
    experts_per_token: tuple[float, ...]
    gate_error: tuple[float, ...]

    def __str__(self) -> str:
        lines = [
            f"{len(self.routers)} routers of {self.num_experts} experts, TopK with k = {self.k}, now ReLU",
            f"loss on the sample: {self.loss_before:.4f} before, {self.loss_after:.4f} after "
            f"({self.loss_after - self.loss_before:+.4f})",
        ]
        for name, active, error in zip(self.routers, self.experts_per_token, self.gate_error, strict=True):
            lines.append(f"  {name}: {active:.2f} experts per token, error of the gates {100 * error:.1f} %")
        return "\n".join(lines)


def relufy(
    model: PreTrainedModel,
    samples: Iterable[Batch],
    *,
    load_balance: bool = True,
    max_loss_increase: float | None = 0.1,
) -> RelufyReport:
    """Turns the TopK routing of a model into ReLU routing, in place.

        report = remoe.relufy(model, batches)          # batches: token ids of some text, (B, S) each
        trainer = Trainer(model, args, train_dataset=data, callbacks=[remoe.SparsityCallback()])

    The gates are fitted to the old ones layer by layer, so that the model starts near what it was; fine-tuning then
    steers the mean of active experts to the old k. In training mode the loss contains lambda times the penalty on the
    gates (arXiv 2412.14711, Eq. 6, 10, 11); at evaluation it is the model's own.

    The model's class becomes `Relufied...`, with `sparsity` and `update_routing` as `RemoeForCausalLM` has them;
    `save_pretrained` and `remoe.load_relufied` keep it. A `RemoeForCausalLM` stays one, with router "relu".

    Args:
        model: a transformers model with a mixture of experts, or a `RemoeForCausalLM` with a router that has k.
        samples: text of the kind that the model is for: token ids, (B, S) int64, or mappings with `input_ids` and
            `attention_mask`. A few thousand tokens do; some tens of thousands are better.
        load_balance: weight the penalty by each expert's load.
        max_loss_increase: how much higher, in nats per token of the sample, the loss may be right afterwards; None for
            no bound.

    Raises:
        ConfigError: for a model without such a mixture or with a quantised router, naming the module; when the loss
            rises by more than allowed: the model is then as it was.
    """
    if isinstance(model, RelufiedMixin):
        raise ConfigError(f"{type(model).__name__} has ReLU routers already")
    routers = _routers(model)
    batches = [as_batch(batch, model.device) for batch in samples]
    if not batches:
        raise ConfigError("relufy needs sample text to calibrate the gates on, but got no batch")
    loss_before = language_model_loss(model, batches)
    recorder = GateRecorder(routers, MAX_TOKENS)
    recorder.run(model, batches)
    k = _one_value(recorder.k, "experts per token")
    num_experts = _one_value({name: recorder.samples(name)[1].shape[1] for name in routers}, "experts")

    fitted, active, errors = {}, [], []
    for name, router in routers.items():
        x_TD, target_TE = recorder.samples(name)
        weight = getattr(router, "weight", None)
        weight_ED = weight.detach().float() if weight is not None and weight.shape[1:] == x_TD.shape[1:] else None
        *fitted[name], error = fit_relu_gates(x_TD, target_TE, weight_ED)
        gate_TE = x_TD @ fitted[name][0].T + fitted[name][1]
        active.append((gate_TE > 0).sum(dim=1).float().mean().item())
        errors.append(error)

    undo = _install_in_remoe if isinstance(model, RemoeForCausalLM) else _install
    restore = undo(model, {"num_experts": num_experts, "k": k, "load_balance": load_balance})
    with torch.no_grad():
        for name, (weight_ED, bias_E) in fitted.items():
            new = model.get_submodule(name)
            new.weight.copy_(weight_ED)
            new.bias.copy_(bias_E)
    loss_after = language_model_loss(model, batches)
    if max_loss_increase is not None and not loss_after - loss_before <= max_loss_increase:
        restore()
        raise ConfigError(
            f"the loss of the sample rose from {loss_before:.4f} to {loss_after:.4f}, by more than "
            f"max_loss_increase = {max_loss_increase}; more sample text makes a closer fit"
        )
    return RelufyReport(tuple(routers), num_experts, k, loss_before, loss_after, tuple(active), tuple(errors))


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
    settings = data["relufied"]
    data["model_type"] = settings["model_type"]
    config = CONFIG_MAPPING[settings["model_type"]].from_dict(data)
    cls = getattr(importlib.import_module(settings["module"]), settings["class"])
    options.setdefault("experts_implementation", experts_function.NAME)
    return relufied_class(cls).from_pretrained(folder, config=config, **options)


def _one_value(values: dict[str, int], what: str) -> int:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in values.items())
        raise ConfigError(f"all layers must have the same number of {what} ({listed})")
    return next(iter(values.values()))


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by name, in the order of the layers."""
    if isinstance(model, RemoeForCausalLM):
        if not model.config.routes_pairs or model.config.router == "relu":
            raise ConfigError(f"router {model.config.router!r} has no TopK routing to convert")
        return {f"model.layers.{i}.mlp.router": layer.mlp.router for i, layer in enumerate(model.model.layers)}
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


class _Context:
    """What the routers of one model share during a forward pass: the mask of padding, and their routings."""

    def __init__(self) -> None:
        self.mask_BS: Tensor | None = None
        self.routings: dict[int, Routing] = {}

    def __deepcopy__(self, memo: dict) -> "_Context":
        return self  # a router copied alone, as by PEFT, still belongs to its model; a copied model makes its own


class RelufiedRouter(ReLURouter):
    """A ReLU router that answers as transformers' routers do: (logits, weights (T, E), indices (T, E))."""

    def __init__(self, context: _Context, layer: int, d_model: int, num_experts: int, k: int, load_balance: bool):
        super().__init__(d_model, num_experts, k, load_balance=load_balance, bias=True)
        self.context = context
        self.layer = layer

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, self.d_model)
        mask_BS = self.context.mask_BS
        # Blocks that see other tokens than the batch's, as some multimodal ones do, are counted without a mask.
        fits = mask_BS is not None and mask_BS.numel() == x_TD.shape[0]
        routing = super().forward(x_TD, mask_BS.flatten() if fits else None)
        self.context.routings.setdefault(self.layer, routing)
        # Every expert is listed: ours leave out those of weight zero, the model's own run them without effect.
        index_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        return routing.logits_TE, routing.gate_TE.to(hidden_states.dtype), index_TE


class RelufiedMixin:
    """What `relufy` adds to a transformers model: the penalty in its loss, steering, saving."""

    sparsity: SparsityController

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._routing_context = _Context()
        for module in self.modules():
            if isinstance(module, RelufiedRouter):
                module.context = self._routing_context

    def update_routing(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Moves lambda by the statistics since the last call; once per optimiser step."""
        self.sparsity.update(group)

    @property
    def regularizer_coefficient(self) -> Tensor:
        """lambda, 0-dim float32."""
        return self.sparsity.lam.clone()

    def save_pretrained(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """As transformers does, with a model type that only `remoe.load_relufied` knows: no TopK model will load it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        data = json.loads(path.read_text())
        if data.get("model_type") != MODEL_TYPE:
            data["relufied"]["model_type"], data["model_type"] = data["model_type"], MODEL_TYPE
            path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SparsityController):
            module.reset_statistics()  # from_pretrained leaves buffers that are not saved undefined
        else:
            super()._init_weights(module)

    @contextmanager
    def recorded_routings(self, inputs: Mapping[str, object]) -> Iterator[list[Routing]]:
        """A list that holds, after the block, the routing of each layer in the forward pass that ran in it.

        Args:
            inputs: of that pass: `attention_mask` and `input_ids` or `inputs_embeds`, to know padding.
        """
        context, mask = self._routing_context, inputs.get("attention_mask")
        ids = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        is_padding_mask = isinstance(mask, Tensor) and mask.ndim == 2 and ids is not None
        context.mask_BS = mask[:, -ids.shape[1] :].bool() if is_padding_mask else None
        context.routings = {}
        found: list[Routing] = []
        try:
            yield found
            found.extend(routing for _, routing in sorted(context.routings.items()))
        finally:
            context.routings = {}

    def observed_penalty(self, routings: Sequence[Routing]) -> Tensor:
        """Counts a training step's routings for lambda; returns lambda times their regulariser, in nats.

        Raises:
            ConfigError: for reentrant recomputation, in which routers get no gradients.
        """
        if any(routing.regularizer.grad_fn is None and self._trains_routers() for routing in routings):
            raise ConfigError("recomputation of a relufied model needs use_reentrant=False")
        self.sparsity.observe(routings)
        device = self.sparsity.lam.device
        return self.regularizer_coefficient * torch.stack([r.regularizer.to(device) for r in routings]).mean()

    def _trains_routers(self) -> bool:
        return torch.is_grad_enabled() and any(
            module.weight.requires_grad for module in self.modules() if isinstance(module, RelufiedRouter)
        )


@functools.cache
def relufied_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of relufied models of a class."""
    signature = inspect.signature(cls.forward)

    class Relufied(RelufiedMixin, cls):
        _keep_in_fp32_modules_strict = set(cls._keep_in_fp32_modules_strict or ()) | {"sparsity"}

        def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
            super().__init__(config, *args, **kwargs)
            _replace_routers(self, config.relufied)

        @functools.wraps(cls.forward)
        def forward(self, *args: object, **kwargs: object) -> object:
            given = signature.bind(self, *args, **kwargs).arguments
            given = given | given.get("kwargs", {})
            with self.recorded_routings(given) as routings:
                output = super().forward(*args, **kwargs)
            if not self.training:
                return output
            penalty = self.observed_penalty(routings)
            labels, items = given.get("labels"), given.get("num_items_in_batch")
            if labels is None:
                return output
            loss = output[0] if isinstance(output, tuple) else output.loss
            if items is not None:
                penalty = penalty * ((labels[:, 1:] != -100).sum().to(penalty.device) / items)
            loss = loss + penalty.to(loss.device)
            if isinstance(output, tuple):
                return (loss, *output[1:])
            output.loss = loss
            return output

    Relufied.__name__ = Relufied.__qualname__ = PREFIX + cls.__name__
    Relufied.__module__ = cls.__module__  # transformers looks up there whether experts can be chosen
    return Relufied


def _install(model: PreTrainedModel, settings: dict):
    """Replaces routers, class and experts; returns what takes it back."""
    cls, implementation = type(model), model.get_experts_implementation()
    old = _routers(model)
    settings = settings | {"class": cls.__name__, "module": cls.__module__, "model_type": model.config.model_type}
    model.set_experts_implementation(experts_function.NAME)
    model.config.relufied = settings
    # No TopK balance loss for ReLU gates, and none that a trainer switches on either.
    off = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
    places = [(place, name) for place in (model.config, model) for name in off if hasattr(place, name)]
    balance = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, _ in balance:
        setattr(place, name, off[name])
    model.__class__ = relufied_class(cls)
    _replace_routers(model, settings)

    def restore() -> None:
        for name, router in old.items():
            model.set_submodule(name, router)
        del model.sparsity, model.config.relufied
        model.__class__ = cls
        model.set_experts_implementation(implementation)
        for place, name, value in balance:
            setattr(place, name, value)

    return restore


def _replace_routers(model: PreTrainedModel, settings: dict) -> None:
    context = _Context()
    routers = _routers(model)
    E, k = settings["num_experts"], settings["k"]
    for layer, (name, router) in enumerate(routers.items()):
        parameter = next(router.parameters())
        d_model = parameter.shape[-1] if parameter.ndim == 2 else model.config.get_text_config().hidden_size
        with torch.device(parameter.device):
            new = RelufiedRouter(context, layer, d_model, E, k, settings["load_balance"])
        model.set_submodule(name, new.to(parameter.dtype))
    with torch.device(parameter.device):
        model.sparsity = SparsityController(len(routers), E, k, **STEERING)
    model._routing_context = context


def _install_in_remoe(model: RemoeForCausalLM, settings: dict):
    """The same for our own model, which remains one."""
    config, controller = model.config, model.sparsity
    old = {name: getattr(config, name) for name in ("router", "router_options", "load_balance", "sparsity_rule")}
    old |= {"lambda_fast_start": config.lambda_fast_start}
    config.router, config.router_options, config.load_balance = "relu", {"bias": True}, settings["load_balance"]
    config.sparsity_rule, config.lambda_fast_start = STEERING["rule"], STEERING["fast_start"]
    E, k = settings["num_experts"], settings["k"]
    routers = [layer.mlp.router for layer in model.model.layers]
    for layer in model.model.layers:
        weight = layer.mlp.router.weight
        new = ReLURouter(config.hidden_size, E, k, bias=True, load_balance=settings["load_balance"])
        layer.mlp.router = new.to(weight.device, weight.dtype)
    model.sparsity = SparsityController(
        len(routers), E, k, lambda_init=config.lambda_init, sum_layers=controller.sum_layers, **STEERING
    ).to(controller.lam.device)

    def restore() -> None:
        for layer, router in zip(model.model.layers, routers, strict=True):
            layer.mlp.router = router
        model.sparsity = controller
        for name, value in old.items():
            setattr(config, name, value)

    return restore
