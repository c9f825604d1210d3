"""From the options of a run to its model: configuration, dtype and the backend that runs the experts."""

import math
from collections.abc import Callable
from typing import Any

import torch

from remoe.errors import ConfigError
from remoe.experts import resolve_backend
from remoe.lab.training.config import TrainConfig
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import Router

VOCAB_MULTIPLE = 1024  # GPT-2's 50,257 becomes the paper's 51,200


def model_config(config: TrainConfig, vocab_size: int, eos_token_id: int) -> RemoeConfig:
    """The configuration of the model that a run trains.

    Args:
        config: options of the run.
        vocab_size: tokens of the tokenizer; the model's vocabulary is padded to a multiple of VOCAB_MULTIPLE.
        eos_token_id: the tokenizer's end-of-text token.

    Raises:
        ConfigError: for sizes that do not fit together, unknown names, or documents masked in segments that mix them.
    """
    model = RemoeConfig(
        **vars(config.model),
        vocab_size=math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        tokenizer_size=vocab_size,
        max_position_embeddings=config.seq_len,
        eos_token_id=eos_token_id,
        router=config.router,
        router_options=config.router_options or None,
        num_experts=config.num_experts,
        num_experts_per_tok=config.k,
        granularity=config.granularity,
        sparsity=vars(config.sparsity).copy(),
    )
    if config.mask_documents and model.router_class.merges:
        raise ConfigError(f"--mask-documents: segments of router {config.router!r} would mix documents")
    return model


def model_without_values(config: TrainConfig) -> RemoeForCausalLM:
    """The model that a run trains, on the meta device: needs no data and no memory.

    Raises:
        ConfigError: when it cannot be built.
    """
    return without_values(model_config(config, config.vocab_size, eos_token_id=0))


def without_values(model: RemoeConfig) -> RemoeForCausalLM:
    """A model on the meta device; raises ConfigError when it cannot be built."""
    with torch.device("meta"):
        return RemoeForCausalLM(model)


def router_of(config: TrainConfig) -> Router:
    """The router of a layer, on the meta device.

    Raises:
        ConfigError: when the model cannot be built.
    """
    return model_without_values(config).model.layers[0].mlp.router


def experts_backend(model: RemoeConfig, dtype: str, device: torch.device) -> str:
    """The backend that runs a model's experts in training.

    Args:
        model: its configuration.
        dtype: the value of `--dtype`.
        device: where the model will train.

    Raises:
        ConfigError: when the backend that the model asks for cannot run there.
    """
    width = model.intermediate_size // model.granularity
    _, width = model.router_class.networks(model.experts_per_layer, width, model.active_per_token)
    computed = torch.bfloat16 if wants_bfloat16(dtype, device) else torch.float32
    return resolve_backend(model.backend, device.type, computed, model.hidden_size, width)


def wants_bfloat16(dtype: str, device: torch.device) -> bool:
    """Whether to train under bfloat16 autocast: when asked to, or by default on a GPU that computes in it natively."""
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "bfloat16"


def compiled(model: RemoeForCausalLM, *, spread: bool) -> Callable[..., Any]:
    """A model as torch.compile's graph; of a model that is spread over processes, attention and norms alone, in place.

    A graph of the whole model would be broken there wherever FSDP gathers weights and wherever tokens are exchanged,
    which asks the device how many pairs there are.
    """
    if not spread:
        return torch.compile(model)
    for layer in model.model.layers:
        for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm):
            part.compile()
    return model


def enable_recomputation(model: RemoeForCausalLM) -> None:
    """Recomputes each layer's activations in the backward pass; the method's name depends on transformers' version."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
