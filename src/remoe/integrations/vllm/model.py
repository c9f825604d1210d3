"""The model that vLLM runs: its LLaMA with our router and its fused experts in place of each feed-forward layer.

Legend: T tokens, D model width, F expert width, E experts.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import AutoWeightsLoader

from remoe.integrations.vllm import check_config, gates_of, largest_gates, slots, vllm_weights
from remoe.models.configuration_remoe import RemoeConfig
from remoe.routing import build_router
from remoe.routing.base import split_by_granularity


class RemoeMoE(nn.Module):
    """Our router in front of vLLM's fused experts, and a shared expert where there is one."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RemoeConfig = vllm_config.model_config.hf_config
        quantization, D = vllm_config.quant_config, config.hidden_size
        E, F, k = split_by_granularity(config.num_experts, config.d_ffn, config.k, config.granularity)
        self.router = build_router(config.router, D, E, k, **(config.router_options or {})).eval()
        check_config(config, self.router)
        self.experts = FusedMoEFactory(
            num_experts=E,
            top_k=slots(config, self.router),
            hidden_size=D,
            intermediate_size=F,
            renormalize=False,
            quant_config=quantization,
            custom_routing_function=largest_gates,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )
        self.shared_expert = None
        if config.shared_expert_size:
            self.shared_expert = LlamaMLP(
                D, config.shared_expert_size, "silu", quantization, prefix=f"{prefix}.shared_expert"
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TD = self.experts(hidden_states=x_TD, router_logits=gates_of(self.router, x_TD))
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view(hidden_states.shape)


class RemoeDecoderLayer(nn.Module):
    """Attention and mixture of experts, each behind a norm that adds the residual connection."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: RemoeConfig = vllm_config.model_config.hf_config
        self.self_attn = build_attention(vllm_config, f"{prefix}.self_attn")
        self.mlp = RemoeMoE(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            normed, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, residual = self.input_layernorm(hidden_states, residual)
        attended = self.self_attn(positions=positions, hidden_states=normed)
        normed, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed), residual


def build_attention(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """vLLM's attention of LLaMA, or with norms on queries and keys that of Qwen3."""
    config: RemoeConfig = vllm_config.model_config.hf_config
    common = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "quant_config": vllm_config.quant_config,
        "cache_config": vllm_config.cache_config,
        "prefix": prefix,
    }
    if config.qk_norm:
        return Qwen3Attention(
            head_dim=config.head_dim,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            **common,
        )
    bias = config.attention_bias
    longest = config.max_position_embeddings
    return LlamaAttention(config=config, max_position_embeddings=longest, bias=bias, bias_o_proj=bias, **common)


class RemoeForCausalLM(LlamaForCausalLM):
    """The language model; ids that no token of the tokenizer has are never sampled."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=RemoeDecoderLayer)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits_TV = super().compute_logits(hidden_states)
        if logits_TV is not None and self.config.tokenizer_size is not None:
            logits_TV[:, self.config.tokenizer_size :] = -torch.inf
        return logits_TV

    @property
    def compute_logits_local(self) -> None:
        """What vLLM samples from where ranks share a batch: it would not leave out those ids, so there is none."""
        raise AttributeError("compute_logits_local")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(vllm_weights(weights))
