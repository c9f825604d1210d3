"""ReMoE language model: LLaMA with a mixture of experts in place of each feed-forward layer.

Attention (GQA, rotary embeddings, SDPA and flash, KV cache), norms and generation are transformers' own. What is
ours: the MoE layer, the routing statistics that flow out of each layer, and the loss.

Legend: B batch, S sequence, T = B S tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from remoe.errors import ConfigError
from remoe.experts import Experts
from remoe.models.attention import CACHE_NAME
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.decoder import RemoeDecoderLayer
from remoe.models.loss import (
    IGNORED_TARGET,
    LossHead,
    is_padding_mask,
    is_plain_head,
    linear_cross_entropy,
    padding_mask,
    shifted_targets,
    without_unused_ids,
)
from remoe.models.norm import RMSNorm
from remoe.models.packing import packed_documents, packed_mask_options
from remoe.models.rotary import RotaryEmbedding
from remoe.models.routed import RoutedModel, add_routing, build_controller, dial_of_tokens, keep_statistics_local
from remoe.models.saving import umask_decides
from remoe.routing import Routing
from remoe.routing.base import Router
from remoe.sparsity import SparsityController


@dataclass
class RemoeModelOutput(BaseModelOutputWithPast):
    """Hidden states of the transformer, and how each layer routed.

    Attributes:
        last_hidden_state: (B, S, D), after the final norm.
        cache: the KV cache, when used; `past_key_values` before transformers 5.24.
        hidden_states: (B, S, D) before each layer and at the end, when asked for.
        attentions: (B, H, S, past + S) weights of each layer, when asked for; needs attention "eager".
        routings: one `Routing` a layer; an item of the output in training mode, otherwise an attribute alone.
    """

    routings: tuple[Routing, ...] | None = None


@dataclass
class RemoeCausalLMOutput(CausalLMOutputWithPast):
    """Logits, and the loss with its parts.

    Attributes:
        loss: lm_loss, and in training mode the total of `SparsityController.loss_terms` too, when labels are given.
        logits: (B, S, V); None for a loss in training mode, unless `return_logits` asks for them.
        cache, hidden_states, attentions: as in `RemoeModelOutput`.
        lm_loss: cross-entropy in nats per predicted token.
        reg_loss: the regulariser over all layers, without its coefficient; at evaluation None without labels.
        routings: one `Routing` a layer. This and `reg_loss` are items of the output in training mode, otherwise
            attributes alone.
    """

    lm_loss: Tensor | None = None
    reg_loss: Tensor | None = None
    routings: tuple[Routing, ...] | None = None


class RemoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every ReMoE model."""

    config: RemoeConfig
    config_class = RemoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RemoeDecoderLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _keys_to_ignore_on_load_unexpected = [r"^sparsity\."]  # state of training, which engines' models do not have
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """As transformers does, but the umask decides who may read the weights.

        A model that came with its code (`remoe export`) is written with it again.
        """
        if getattr(self, "hf_quantizer", None) is not None:  # transformers cannot take back how it read such weights
            kwargs.setdefault("save_original_format", False)
        with umask_decides(save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)
        # A model of the code in such a folder has it copied by transformers.
        if getattr(self.config, "auto_map", None) and __name__ == "remoe.models.modeling_remoe":
            import_module("remoe.models.bundle").write_bundle(Path(save_directory))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, Router)):
            # transformers guards torch's initialisers here: what was loaded is left alone.
            steered = isinstance(module, Router) and module.steered
            std = self.config.router_std if steered else None
            module.reset_parameters(self.config.initializer_range if std is None else std)
            if isinstance(module, Router):
                module.reset_state()
        elif isinstance(module, SparsityController):
            module.reset()


class RemoeModel(RemoePreTrainedModel):
    """The transformer without its language-model head."""

    def __init__(self, config: RemoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RemoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        states = [state for layer in self.layers for state in layer.mlp.router.named_buffers()]
        # They are steered in small steps, as lambda.
        self._keep_in_fp32_modules_strict = {name for name, state in states if state.is_floating_point()}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        token_mask: Tensor | None = None,
        gate_threshold: float | Tensor | None = None,
        max_experts: int | Tensor | None = None,
        **kwargs,
    ) -> RemoeModelOutput:
        """Runs the transformer; arguments are those of transformers' decoder models.

        Args:
            input_ids: (B, S) int64; or `inputs_embeds`, (B, S, D).
            attention_mask: (B, past + S), zero for padding: not attended to, not routed, not counted.
            past_key_values, cache: the KV cache, under its older or its newer name.
            token_mask: (B, S), zero for padding, where `attention_mask` is a ready one that does not tell.
            gate_threshold, max_experts: in this call instead of `set_gate_threshold` and `set_max_experts`: one number,
                (B,) for each row its own, or (B, S) for each token; E experts or more for no limit. They count at
                evaluation only.

        Raises:
            ConfigError: for a negative `gate_threshold`, a `max_experts` below 1, values of another shape, or either
                with a router that routes no pairs; for `output_attentions` with an attention that does not
                compute the weights; for a KV cache with a router that does not support one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if cache is not None and not self.config.router_class.supports_cache:
            raise ConfigError(f"router {self.config.router!r} works without a KV cache only: use_cache=False")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ConfigError('output_attentions needs a model with attn_implementation="eager"')
        S, device = hidden_BSD.shape[1], hidden_BSD.device
        mask = padding_mask(attention_mask, token_mask)
        token_mask_BS = None if mask is None else mask[:, -S:].bool()
        document_BS, options = None, {"attention_mask": attention_mask, CACHE_NAME: cache}
        # Only positions that a caller gave can mark packed documents, and only without a past.
        if position_ids is not None and cache is None:
            position_ids = position_ids.expand(len(hidden_BSD), -1)
            document_BS = packed_documents(position_ids, token_mask_BS)
        if document_BS is not None:
            if self.config.router_class.merges and not torch.compiler.is_compiling():
                raise ConfigError(f"segments of router {self.config.router!r} would mix the documents packed in a row")
            options |= packed_mask_options(document_BS, attention_mask, self.config._attn_implementation)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_BSD, position_ids=position_ids, **options
        )
        if use_cache and cache is None and not self.training:  # not earlier: beside a cache no documents are looked for
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(S, device=device) + past).unsqueeze(0)
        dial = dial_of_tokens(hidden_BSD, gate_threshold=gate_threshold, max_experts=max_experts)
        if dial:
            self.config.check_gates()
        if self.training:
            _refuse_reentrant_recomputation(self.layers[0])
        position_embeddings = self.rotary_emb(hidden_BSD, position_ids=position_ids)

        routings, states, weights = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden_BSD)
            hidden_BSD, routing, weights_BHSS = layer(
                hidden_BSD,
                token_mask_BS,
                input_ids if self.config.router_class.needs_ids else None,
                document_BS if self.config.router_class.needs_documents else None,
                dial,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: cache},
                **kwargs,
            )
            routings.append(routing)
            if output_attentions:
                weights.append(weights_BHSS)
        hidden_BSD = self.norm(hidden_BSD)
        if output_hidden_states:
            states.append(hidden_BSD)
        output = RemoeModelOutput(
            last_hidden_state=hidden_BSD,
            hidden_states=tuple(states) or None,
            attentions=tuple(weights) or None,
            **{CACHE_NAME: cache},
        )
        return add_routing(output, self.training, routings=tuple(routings))


class RemoeForCausalLM(RoutedModel, RemoePreTrainedModel, GenerationMixin):
    """ReMoE language model with loss = language model + lambda * regulariser (arXiv 2412.14711, Eq. 6).

    In evaluation mode the loss is the language model's alone. In training mode each forward pass adds its statistics to
    `self.sparsity`; call `update_routing()` once per optimiser step. Where lambda has no part in the loss ("topk" and
    others) the controller only measures.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RemoeConfig) -> None:
        super().__init__(config)
        self.model = RemoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.sparsity = build_controller(config, [layer.mlp for layer in self.model.layers])
        keep_statistics_local(self)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        cache: Cache | None = None,
        gate_threshold: float | Tensor | None = None,
        max_experts: int | Tensor | None = None,
        **kwargs,
    ) -> RemoeCausalLMOutput:
        """Logits, and with labels the loss.

        Without logits to return, the loss comes from `linear_cross_entropy`, which never holds them. Where that would
        pass by something of the user's (a `loss_function` of one's own, an adapter on `lm_head` or a hook), the
        logits are computed and returned in any case.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: see `RemoeModel`.
            gate_threshold, max_experts: see `RemoeModel`; arguments of `generate` too.
            labels: (B, S) int64, the tokens themselves; shifted here. -100, and padding, is no target.
            shift_labels: (B, S) int64, targets already shifted, instead of `labels`. One of `kwargs`, because
                transformers' Trainer expects of a batch every label that the signature names.
            logits_to_keep: as in transformers: only the last n positions, or these.
            num_items_in_batch: targets in all micro-batches of the optimiser step. Both losses are then this
                micro-batch's share, so that their sum over micro-batches is the loss of the whole batch (the
                load-balanced penalty only as far as the loads agree: see `load_balanced_l1_loss`).
            num_tokens_in_batch: non-padding tokens in all those micro-batches, where their ratio to targets varies;
                by default the regulariser's share is the micro-batch's share of the targets.
            return_logits: whether to return logits; by default always except with a loss in training mode.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            gate_threshold=gate_threshold,
            max_experts=max_experts,
            return_dict=True,
            **kwargs,
        )
        if self.training:
            self.sparsity.observe(outputs.routings)
        reg_loss = self.sparsity.regularizer(outputs.routings) if self.training else None
        target_BS = shifted_targets(labels, shift_labels, padding_mask(attention_mask, kwargs.get("token_mask")))
        if return_logits is None:
            return_logits = target_BS is None or not self.training
        logits = None
        if return_logits or target_BS is None or not self._fuses_loss():
            kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
            if self._has_unused_ids():
                logits = without_unused_ids(logits, self.config.tokenizer_size)

        loss = lm_loss = None
        if target_BS is not None:
            num_targets = (target_BS != IGNORED_TARGET).sum().clamp(min=1)
            items = num_targets if num_items_in_batch is None else num_items_in_batch
            lm_loss = self._language_model_loss(outputs.last_hidden_state, logits, target_BS, items)
            share = num_targets / items
            if num_tokens_in_batch is not None:
                share = outputs.routings[0].num_tokens / num_tokens_in_batch
            terms = self.sparsity.loss_terms(outputs.routings, share)
            reg_loss = terms.regularizer
            loss = lm_loss + terms.total.to(lm_loss.device) if self.training else lm_loss
        output = RemoeCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return add_routing(output, self.training, reg_loss=reg_loss, routings=outputs.routings)

    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())  # transformers reads its signature
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args, **kwargs) -> dict[str, object]:
        """As transformers does; where a static cache makes a ready mask of the given one, that still tells padding."""
        inputs, mask = super().prepare_inputs_for_generation(input_ids, *args, **kwargs), kwargs.get("attention_mask")
        if is_padding_mask(mask) and not is_padding_mask(inputs.get("attention_mask")):
            given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            # A copy, as transformers makes of what it cuts: a stride that grows would compile anew for each token.
            token_mask = mask[:, -given.shape[1] :].to(given.device)
            inputs["token_mask"] = token_mask.clone(memory_format=torch.contiguous_format)
        return inputs

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: object, **kwargs: object) -> nn.Module:
        """As transformers does; every id below `new_num_tokens` is then a token."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.tokenizer_size = new_num_tokens
        return embedding

    def _has_unused_ids(self) -> bool:
        return self.config.tokenizer_size not in (None, self.vocab_size)

    def _fuses_loss(self) -> bool:
        return is_plain_head(self.lm_head) and self.loss_function is ForCausalLMLoss

    def _language_model_loss(
        self, hidden_BSD: Tensor, logits: Tensor | None, target_BS: Tensor, items: Tensor | int
    ) -> Tensor:
        """0-dim: summed cross-entropy of the targets / items, from the logits where there are any."""
        if logits is not None:
            return self.loss_function(logits, None, self.vocab_size, num_items_in_batch=items, shift_labels=target_BS)
        weight_VD, tokens = self.lm_head.weight, self.config.tokenizer_size if self._has_unused_ids() else None
        hidden_TD, target_T = hidden_BSD.flatten(0, 1).to(weight_VD.device), target_BS.flatten().to(weight_VD.device)
        if isinstance(self.lm_head, LossHead):
            nats = self.lm_head(hidden_TD, target_T, tokens)
        else:
            nats = linear_cross_entropy(hidden_TD, weight_VD[:tokens], target_T)
        return nats / (items.to(nats.device) if isinstance(items, Tensor) else items)


def _refuse_reentrant_recomputation(layer: RemoeDecoderLayer) -> None:
    """Reentrant checkpointing follows tensors, not objects that hold them: it would cut the router's gradients off."""
    recompute = getattr(layer, "_gradient_checkpointing_func", None)
    if layer.gradient_checkpointing and getattr(recompute, "keywords", {}).get("use_reentrant"):
        raise ConfigError("recomputation of a ReMoE model needs use_reentrant=False")
