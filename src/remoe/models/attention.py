"""Attention of the ReMoE language model: LLaMA's or Qwen3's, with our own products and rotation.

Legend: B batch, S sequence, D model width, H heads of queries, G heads of keys and values, d width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from remoe.matmul import Linear, joined_linear
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.kernels import is_bare, kernels_for
from remoe.models.rotary import rotate, rotate_packed

# transformers calls a model's KV cache `cache` since 5.24, `past_key_values` before: as argument and in outputs.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class _Attention(nn.Module):
    """The forward pass where kernels can run, otherwise that of transformers."""

    config: RemoeConfig

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) to (B, S, D), and the weights (B, H, S, past + S), or None; arguments as in transformers."""
        if kernels_for(hidden_states, *position_embeddings) is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        cache = kwargs.pop(CACHE_NAME, None)
        # The joined weights of one product are a copy, which few tokens do not repay.
        q_BHSd, k_BGSd, v_BGSd = self._heads(hidden_states, *position_embeddings, join=cache is None)
        if cache is not None:
            paged = {"kwargs": kwargs} if CACHE_NAME == "cache" else {}  # for a paged one
            k_BGSd, v_BGSd = cache.update(k_BGSd, v_BGSd, self.layer_idx, **paged)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended_BSHd, weights_BHSS = attend(
            self,
            q_BHSd,
            k_BGSd,
            v_BGSd,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended_BSHd.flatten(2)), weights_BHSS

    def _heads(self, hidden_BSD: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, join: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries (B, H, S, d) and keys (B, G, S, d), and values (B, G, S, d)."""
        projections, d = (self.q_proj, self.k_proj, self.v_proj), self.head_dim
        if join and not self.config.qk_norm and all(is_bare(p, Linear) and p.bias is None for p in projections):
            weights = [projection.weight for projection in projections]
            autocast = torch.is_autocast_enabled("cpu")
            if not autocast and kernels_for(hidden_BSD, cos_BSd, sin_BSd, *weights) is not None:
                # One product, and one gradient of the hidden states instead of a sum of three.
                qkv_BSP = joined_linear(hidden_BSD, *weights)
                return rotate_packed(qkv_BSP, cos_BSd, sin_BSd, len(weights[0]) // d, len(weights[1]) // d)
        q_BSHd, k_BSGd, v_BSGd = (projection(hidden_BSD).unflatten(-1, (-1, d)) for projection in projections)
        if self.config.qk_norm:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        return *rotate(q_BSHd.transpose(1, 2), k_BSGd.transpose(1, 2), cos_BSd, sin_BSd), v_BSGd.transpose(1, 2)


class PlainAttention(_Attention, LlamaAttention):
    """LLaMA's attention."""


class NormedAttention(_Attention, Qwen3Attention):
    """Qwen3's attention: with norms on queries and keys."""


def build_attention(config: RemoeConfig, layer_idx: int) -> PlainAttention | NormedAttention:
    """The attention of one layer, which `config.qk_norm` chooses."""
    attention = (NormedAttention if config.qk_norm else PlainAttention)(config, layer_idx)
    for name, module in list(attention.named_children()):
        if isinstance(module, nn.Linear):
            setattr(attention, name, Linear(module.in_features, module.out_features, module.bias is not None))
    return attention
