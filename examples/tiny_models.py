"""Tiny random models of the architectures that `relufy` and `upcycle` convert; the tests use them too."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FINE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# One dense layer first, and shared experts.
_DEEP = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
_DEEP |= {"first_k_dense_replace": 1, "num_hidden_layers": 3}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# Their blocks follow the common contract only since this version of transformers; before, relufy refuses them.
SINCE_5_23 = ("granitemoe", "granitemoeshared", "jamba")
MIXTURES = {
    "mixtral": _LOCAL,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _FINE | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": _FINE | {"head_dim": 8},
    "qwen3_next": _FINE | {"shared_expert_intermediate_size": 24, "layer_types": ["full_attention"] * 2, "head_dim": 8},
    "deepseek_v3": _DEEP | _LATENT | {"n_group": 2, "num_key_value_heads": 4},
    "glm4_moe": _DEEP | {"head_dim": 8},
    "solar_open": _DEEP | {"head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "granitemoe": _LOCAL,
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 32},
    "gpt_oss": _LOCAL | {"head_dim": 8, "sliding_window": 16, "rope_parameters": {"rope_type": "default"}},
    "phimoe": _LOCAL,
    "lfm2_moe": _FINE
    | {"num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "minimax": _LOCAL | {"layer_types": ["full_attention"] * 2},
    "minimax_m2": _LOCAL | {"head_dim": 8},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
    },
}
DENSE = {"llama": {}, "mistral": {"sliding_window": 32}, "qwen2": {}, "qwen3": {"head_dim": 16}}


def build(model_type: str, **changes) -> PreTrainedModel:
    """A model in evaluation mode whose weights are large enough for its parts to matter."""
    torch.manual_seed(0)
    options = _COMMON | (MIXTURES | DENSE).get(model_type, {}) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return model.eval()


def token_ids(batch: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
