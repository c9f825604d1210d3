"""Megatron's names of a model's tensors, and ours."""

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM

FC1, FC2 = "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"

# One layer: Megatron's name, and ours. The first name is that of Transformer Engine's modules, which fuse norm and
# product; the others are those of Megatron's own modules.
LAYER_NAMES = {
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"): "input_layernorm.weight",
    ("self_attention.linear_proj.weight",): "self_attn.o_proj.weight",
    ("self_attention.q_layernorm.weight",): "self_attn.q_norm.weight",
    ("self_attention.k_layernorm.weight",): "self_attn.k_norm.weight",
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): "post_attention_layernorm.weight",
    ("mlp.router.weight",): "mlp.router.weight",
    (FC1,): "mlp.experts.gate_up_proj",
    (FC2,): "mlp.experts.down_proj",
    ("mlp.shared_experts.linear_fc1.weight",): "mlp.shared_expert.gate_up_proj",
    ("mlp.shared_experts.linear_fc2.weight",): "mlp.shared_expert.down_proj",
}
WHOLE_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
QKV = "self_attention.linear_qkv.weight"


def _qkv_shape(config: RemoeConfig) -> tuple[int, int, int]:
    """(groups, heads of a group with its key and its value, head width)."""
    groups = config.num_key_value_heads
    return groups, config.num_attention_heads // groups + 2, config.head_dim


def from_megatron(tensors: dict[str, Tensor], config: RemoeConfig) -> dict[str, Tensor]:
    """The whole tensors of a checkpoint as the state dict of a `RemoeForCausalLM`.

    Raises:
        ConfigError: when one has no counterpart.
    """
    left = dict(tensors)

    def take(*names: str) -> Tensor | None:
        return next((left.pop(name) for name in names if name in left), None)

    ours = {new: take(old) for old, new in WHOLE_NAMES.items()}
    for i in range(config.num_hidden_layers):
        old, new = f"decoder.layers.{i}.", f"model.layers.{i}."
        for names, our_name in LAYER_NAMES.items():
            ours[new + our_name] = take(*(old + name for name in names))
        if (qkv := take(old + QKV)) is not None:
            groups, per_group, width = _qkv_shape(config)
            if qkv.shape[0] != groups * per_group * width:
                raise ConfigError(f"{old + QKV} has {qkv.shape[0]} rows, not {groups} x {per_group} x {width}")
            grouped = qkv.unflatten(0, (groups, per_group, width))
            for part, heads in (("q", grouped[:, :-2]), ("k", grouped[:, -2]), ("v", grouped[:, -1])):
                ours[f"{new}self_attn.{part}_proj.weight"] = heads.reshape(-1, qkv.shape[1])
        for part in ("gate_up_proj", "down_proj"):
            if (shared := ours[f"{new}mlp.shared_expert.{part}"]) is not None:
                ours[f"{new}mlp.shared_expert.{part}"] = shared[None]
    if left:
        raise ConfigError(f"{sorted(left)[0]} has no counterpart in a ReMoE model")
    return {name: tensor for name, tensor in ours.items() if tensor is not None}


def to_megatron(model: RemoeForCausalLM) -> dict[str, Tensor]:
    """The whole tensors of a model by Megatron's names, on the CPU."""
    config, state = model.config, {name: value.detach().cpu() for name, value in model.state_dict().items()}
    tensors = {old: state[new] for old, new in WHOLE_NAMES.items()}
    if config.tie_word_embeddings:
        del tensors["output_layer.weight"]
    groups, per_group, width = _qkv_shape(config)
    for i in range(config.num_hidden_layers):
        old, new = f"decoder.layers.{i}.", f"model.layers.{i}."
        for (name, *_), our_name in LAYER_NAMES.items():
            if (tensor := state.get(new + our_name)) is not None:
                tensors[old + name] = tensor[0] if "shared_expert" in our_name else tensor
        q, k, v = (state[f"{new}self_attn.{part}_proj.weight"].unflatten(0, (groups, -1, width)) for part in "qkv")
        tensors[old + QKV] = torch.cat([q, k, v], dim=1).reshape(groups * per_group * width, -1)
    return tensors
