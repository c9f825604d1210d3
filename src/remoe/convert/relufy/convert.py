"""`relufy`: the TopK routers of a mixture-of-experts model replaced by ReLU routers, in place.

Transformers' mixtures all have a router, `gate` or `router`, that returns (logits, weights, indices), and an experts
module that takes the last two. The router becomes ReLU(x W + b), fitted to the weights that the old one gave on sample
text; the experts run by ours. Attention, shared experts and dense layers are not touched.

Legend: B batch, S sequence, T tokens, D model width, E experts, K experts per token.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from remoe.convert.relufy import experts as experts_function
from remoe.convert.relufy.fit import Batch, GateRecorder, as_batch, fit_relu_gates, language_model_loss
from remoe.convert.relufy.model import (
    STEERING,
    RelufiedMixin,
    mixture_routers,
    recompute_with_masks,
    relufied_class,
    replace_routers,
)
from remoe.errors import ConfigError
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.routed import build_controller
from remoe.routing import ReLURouter, Router, build_router
from remoe.routing.base import LinearRouter
from remoe.sparsity import SparsityController

MAX_TOKENS = 16_384


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
            `attention_mask`. A few thousand tokens do; the fit takes the first 16,384, the loss all.
        load_balance: weight the penalty by each expert's load.
        max_loss_increase: how much higher, in nats per token of the sample, the loss may be right afterwards; None for
            no bound.

    Raises:
        ConfigError: for a model without such a mixture or with a quantised router, naming the module; when the loss
            rises by more than allowed: the model is then as it was.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"relufy takes a model of transformers, but {name} is none; take it out of its wrapper")
    if isinstance(model, RelufiedMixin):
        raise ConfigError(f"{name} has ReLU routers already")
    routers = _routers(model)
    if model.get_output_embeddings() is None:
        raise ConfigError(f"relufy takes a language model, but {name} has no head over the vocabulary")
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
        logits_TE = x_TD @ fitted[name][0].T + fitted[name][1]
        active.append((logits_TE > 0).sum(dim=1).float().mean().item())
        errors.append(error)

    install = _install_in_remoe if isinstance(model, RemoeForCausalLM) else _install
    restore = install(model, {"num_experts": num_experts, "k": k, "load_balance": load_balance})
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
            f"max_loss_increase = {max_loss_increase}; more sample text, to {MAX_TOKENS:,} tokens, makes a closer fit"
        )
    return RelufyReport(tuple(routers), num_experts, k, loss_before, loss_after, tuple(active), tuple(errors))


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, RemoeForCausalLM):
        return mixture_routers(model)
    routers = {f"model.layers.{i}.mlp.router": layer.mlp.router for i, layer in enumerate(model.model.layers)}
    learned = all(isinstance(router, LinearRouter) for router in routers.values())
    if not model.config.routes_pairs or not learned or model.config.router_class is ReLURouter:
        raise ConfigError(f"router {model.config.router!r} has no learned choice of experts to convert")
    return routers


def _one_value(values: dict[str, int], what: str) -> int:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in values.items())
        raise ConfigError(f"all layers must have the same number of {what} ({listed})")
    return next(iter(values.values()))


def _install(model: PreTrainedModel, settings: dict) -> Callable[[], None]:
    """Replaces routers, class and experts; returns what takes it back."""
    cls, implementation = type(model), model.get_experts_implementation()
    relufied = relufied_class(cls)  # before anything is changed
    old = mixture_routers(model)
    settings = settings | {"class": cls.__name__, "module": cls.__module__, "model_type": model.config.model_type}
    model.set_experts_implementation(experts_function.NAME)
    model.config.relufied = settings
    # No TopK balance loss for ReLU gates, and none that a trainer switches on either.
    off = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
    places = [(place, name) for place in (model.config, model) for name in off if hasattr(place, name)]
    balance = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, _ in balance:
        setattr(place, name, off[name])
    model.__class__ = relufied
    replace_routers(model, settings)

    def restore() -> None:
        for name, router in old.items():
            model.set_submodule(name, router)
        recompute_with_masks(model, None)
        del model.sparsity, model.config.relufied
        model.__class__ = cls
        model.set_experts_implementation(implementation)
        for place, name, value in balance:
            setattr(place, name, value)

    return restore


def _install_in_remoe(model: RemoeForCausalLM, settings: dict) -> Callable[[], None]:
    """The same for our own model, which remains one."""
    config = copy.copy(model.config)  # the model's own is changed when its new routers are there
    router_options = {"bias": True} if settings["load_balance"] else {"bias": True, "load_balance": False}
    if (cap := (config.router_options or {}).get("max_experts_per_token")) is not None:
        router_options["max_experts_per_token"] = cap
    options = {"router": "relu", "router_options": router_options, "sparsity": config.sparsity | STEERING}
    old = {name: getattr(config, name) for name in options}, [layer.mlp.router for layer in model.model.layers]
    for name, value in options.items():
        setattr(config, name, value)
    E, k = settings["num_experts"], settings["k"]
    routers = [build_router("relu", config.hidden_size, E, k, **router_options).to(router.weight) for router in old[1]]

    def put(options: dict[str, object], routers: list[Router], controller: SparsityController | None) -> None:
        for name, value in options.items():
            setattr(model.config, name, value)
        for layer, router in zip(model.model.layers, routers, strict=True):
            layer.mlp.router = router
        layers, device = [layer.mlp for layer in model.model.layers], model.sparsity.lam.device
        model.sparsity = controller or build_controller(model.config, layers).to(device)

    restore = partial(put, *old, model.sparsity)
    put(options, routers, None)
    return restore
