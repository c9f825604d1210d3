"""The routing of any mixture of experts: ours, one that `relufy` converted, and transformers' own, unconverted.

transformers' mixtures share a contract: their routers return (logits, weights, indices). Hooks read it, and change it
to switch an expert off.

Legend: B batch, S sequence, T = B S tokens, K listed experts per token, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from remoe.convert.relufy.fit import routed
from remoe.convert.relufy.model import RelufiedMixin, RelufiedRouter, mixture_routers
from remoe.errors import ConfigError
from remoe.models.context import longest_sequence
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating
from remoe.routing import Routing
from remoe.routing.assignment import Assignment
from remoe.routing.replay import executed_pairs


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routed: (T, E) bool executed pairs and (T, E) float32 gates, which are zero elsewhere."""

    active_TE: Tensor
    gate_TE: Tensor


class Mixture:
    """A language model whose routing can be read.

    Args:
        model: with routers of ours or of transformers; it is run on one token to learn its sizes.

    Attributes:
        layers, experts: L and E.
        k: target number of active experts per token.
        router: name of the router; "topk" for transformers' routers, whatever scores they compare.
        steered: whether lambda steers the number of active experts.
        shared_expert: whether tokens also run an expert that is not routed; None if unknown.

    Raises:
        ConfigError: for a model without a mixture, or with routers of another kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ours = isinstance(model, RemoeForCausalLM)
        if self.ours:
            c = model.config
            if not c.routes_pairs:
                raise ConfigError(f"router {c.router!r} does not send single tokens to experts: it has no routing")
            self.routers: dict[str, nn.Module] = {
                f"model.layers.{i}.mlp.router": layer.mlp.router for i, layer in enumerate(model.model.layers)
            }
            self.layers, self.experts, self.k = c.num_hidden_layers, c.experts_per_layer, c.active_per_token
            self.router, self.steered = c.router, c.steered and c.sparsity["rule"] != "none"
            self.shared_expert: bool | None = c.shared_expert_size > 0
            return
        self.routers = mixture_routers(model)
        self.layers = len(self.routers)
        self.steered = isinstance(model, RelufiedMixin)
        self.router = "relu" if self.steered else "topk"
        self.shared_expert = None
        self.sizes: dict[str, tuple[int, int]] = {}
        with evaluating(model):
            self.run(torch.zeros(1, 1, dtype=torch.int64))
        if len(set(self.sizes.values())) > 1:
            listed = ", ".join(f"{name}: {E} experts, {k} per token" for name, (E, k) in self.sizes.items())
            raise ConfigError(f"all layers must have the same number of experts ({listed})")
        self.experts, self.k = next(iter(self.sizes.values()))
        if self.steered:
            self.k = model.config.relufied["k"]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.parameters()).device

    @property
    def longest(self) -> int | None:
        """The longest sequence that the model is for; None if it does not say."""
        return longest_sequence(self.model)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.model.get_output_embeddings().weight.shape[0]

    def run(
        self,
        input_BS: Tensor,
        mask_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
        *,
        logits: bool = True,
    ) -> tuple[Tensor, list[LayerRouting]]:
        """Logits (B, S, V) and the routing of each layer, in the model's present mode.

        Args:
            input_BS: (B, S) int64, token ids.
            mask_BS: (B, S) bool, false for padding; None without padding.
            position_BS: (B, S) int64, for packed documents; None for one document per row.
            logits: False if they are not needed; a model of ours then computes only those of the last position.

        Raises:
            ConfigError: for a router that is not reached, or answers in another way than transformers' do.
        """
        given = {"input_ids": input_BS.to(self.device), "use_cache": False}
        if mask_BS is not None:
            given["attention_mask"] = mask_BS.to(self.device)
        if position_BS is not None:
            given["position_ids"] = position_BS.to(self.device)
        if self.ours:
            given["logits_to_keep"] = 0 if logits else 1
        heard: list[list[LayerRouting]] = []
        with self.listening(lambda output, layers: heard.append(layers)):
            out = self.model(**given)
        return out.logits, heard[0]

    @contextmanager
    def listening(self, hear: Callable[[Any, list[LayerRouting]], None]) -> Iterator[None]:
        """Context in which every forward pass of the model, also those of `generate`, is reported.

        Args:
            hear: called after each pass with the model's output and the routing of each layer, whose T are the tokens
                of that pass, row after row.

        Raises:
            ConfigError: in a pass, for a router that is not reached, or answers in another way than transformers' do.
        """
        if self.ours:
            hook = self.model.register_forward_hook(
                lambda model, args, out: hear(out, [LayerRouting(executed_pairs(r), r.gate_TE) for r in out.routings])
            )
            hooks = [hook]
        else:
            hooks = self._listen_to_routers(hear)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _listen_to_routers(self, hear: Callable[[Any, list[LayerRouting]], None]) -> list[RemovableHandle]:
        found: dict[str, LayerRouting] = {}
        tokens = 0

        def begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal tokens
            found.clear()
            tokens = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

        def reader(name: str) -> Callable:
            def read(router: nn.Module, args: tuple, output: object) -> None:
                gate_TE, active_TE, k = routed(output, tokens, router, name)
                self.sizes[name] = (gate_TE.shape[1], k)
                if isinstance(router, RelufiedRouter):  # lists every expert, those that are not executed by a zero
                    active_TE = gate_TE != 0
                found[name] = LayerRouting(active_TE, gate_TE.float())

            return read

        def end(model: nn.Module, args: tuple, output: Any) -> None:
            for name in self.routers:
                if name not in found:
                    raise ConfigError(f"{name}: the text never reached this router")
            hear(output, [found[name] for name in self.routers])

        readers = [router.register_forward_hook(reader(name)) for name, router in self.routers.items()]
        begins = self.model.register_forward_pre_hook(begin, with_kwargs=True)
        return [begins, *readers, self.model.register_forward_hook(end)]

    @contextmanager
    def without(self, layer: int, expert: int) -> Iterator[None]:
        """Context in which one expert of a layer adds nothing to any token; the gates of the others do not change."""

        def silence(router: nn.Module, args: tuple, output: object) -> object:
            if isinstance(output, Routing):
                return _without(output, expert)
            logits, weight_TK, index_TK = output
            return logits, weight_TK.masked_fill(index_TK == expert, 0), index_TK

        router = [*self.routers.values()][layer]
        hook = router.register_forward_hook(silence)
        try:
            yield
        finally:
            hook.remove()


def _without(routing: Routing, expert: int) -> Routing:
    kept_E = torch.arange(routing.gate_TE.shape[1], device=routing.gate_TE.device) != expert
    gate_TE = routing.gate_TE * kept_E
    pairs = Assignment.from_gates(gate_TE, executed_pairs(routing) & kept_E)
    return replace(routing, assignment=pairs, gate_TE=gate_TE)
