"""Checkpoints of the authors' ReMoE code, a fork of Megatron-LM: `load_megatron` and `save_megatron`.

Their files (`megatron_files`) become a dictionary of whole tensors, which gets our names (`megatron_names`), and back.
Here are the two functions, and what Megatron's arguments mean as a `RemoeConfig`.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from remoe.convert.megatron.files import (
    EXPERT_LAYOUTS,
    LAMBDA,
    Ranks,
    argument,
    expert_width,
    read_checkpoint,
    write_checkpoint,
)
from remoe.convert.megatron.inert_pickle import Inert
from remoe.convert.megatron.names import from_megatron, to_megatron
from remoe.errors import ConfigError
from remoe.models.configuration_remoe import RemoeConfig, check_fields, take_todays_names
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import ReLURouter

# Arguments of a model that RemoeForCausalLM computes, where a checkpoint has them.
REQUIRED = {
    "moe_relu_routing": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "virtual_pipeline_model_parallel_size": None,
    "moe_layer_freq": 1,
}


def load_megatron(folder: str | Path, iteration: int | None = None, **options: object) -> RemoeForCausalLM:
    """A model trained by the authors' code (thu-ml/ReMoE) with `--moe-relu-routing`.

        model = remoe.load_megatron("logs/test");  model.save_pretrained("hf")

    Reads formats "torch" (a file per rank, any split over tensor, pipeline and expert parallel ranks) and "torch_dist"
    (the default of their scripts), experts sequential or grouped, without running code of the files. Lambda is the
    checkpoint's; the penalty is summed over layers and steered as in their code (`regularizer_normalization` and the
    rule "official"). With `regularizer_normalization="paper"` lambda is L times as large, for an equal penalty.
    Optimiser states are not read.

    Args:
        folder: what `--save` named, with `latest_checkpointed_iteration.txt`, or an `iter_...` folder in it.
        iteration: which one; the newest by default.
        options: further fields of `RemoeConfig`.

    Returns:
        The model, for evaluation, in the checkpoint's dtype. Its vocabulary is Megatron's padded one.

    Raises:
        ConfigError: when there is no such checkpoint, it is incomplete, or the model is of another kind; naming what.
    """
    path, args, tensors = read_checkpoint(Path(folder), iteration)
    lam = tensors.pop(LAMBDA, None)
    if lam is None:
        raise ConfigError(f"{path} has no {LAMBDA}: it was not trained with --moe-relu-routing")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_pos_emb.inv_freq")}
    config = _config_of(args, tensors, options)
    state = from_megatron(tensors, config)
    model = RemoeForCausalLM(config).to(state["model.embed_tokens.weight"].dtype)
    _fill(model, state)
    model.sparsity.lam.copy_(lam / _over_ours(config))
    return model.eval()


def save_megatron(
    model: RemoeForCausalLM,
    folder: str | Path,
    *,
    iteration: int = 1,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    experts: str = "te_grouped",
    args: dict[str, object] | None = None,
) -> Path:
    """Writes a model as the authors' code reads it, in format "torch".

    Their program continues from it with `--ckpt-format torch --load FOLDER --no-load-optim --no-load-rng`.

    Args:
        model: with router "relu".
        folder: a new or empty one.
        iteration: the number that it is given.
        tensor_parallel, pipeline_parallel, expert_parallel: ranks to cut for; experts are cut over both the tensor and
            the expert parallel ranks.
        experts: "te_grouped" (`--moe-grouped-gemm` with Transformer Engine), "grouped" (the same with
            `--moe-use-legacy-grouped-gemm`), or "sequential" (without).
        args: further arguments of Megatron to record, e.g. `tokenizer_type`.

    Returns:
        The folder of the iteration.

    Raises:
        ConfigError: for a model that Megatron's lacks, or sizes that the ranks do not divide.
    """
    config, ranks = model.config, Ranks(tensor_parallel, pipeline_parallel, expert_parallel)
    if experts not in EXPERT_LAYOUTS:
        raise ConfigError(f"unknown layout of experts {experts!r}; choose one of: {', '.join(EXPERT_LAYOUTS)}")
    _check_exportable(model)
    sizes = {
        "num_key_value_heads": (config.num_key_value_heads, ranks.tensor),
        "vocab_size": (config.vocab_size, ranks.tensor),
        "num_hidden_layers": (config.num_hidden_layers, ranks.pipeline),
        "the number of experts": (config.experts_per_layer, ranks.expert),
        "the width of an expert": (config.intermediate_size // config.granularity, ranks.tensor),
        "shared_expert_size": (config.shared_expert_size, ranks.tensor),
    }
    for name, (size, count) in sizes.items():
        if count < 1 or size % count:
            raise ConfigError(f"{count} ranks do not divide {name} = {size}")
    recorded = Namespace(**(_args_of(config, ranks, experts) | (args or {})))
    tensors = to_megatron(model) | {LAMBDA: model.sparsity.lam.detach().cpu() * _over_ours(config)}
    return write_checkpoint(Path(folder), iteration, recorded, tensors, ranks, experts)


def _fill(model: RemoeForCausalLM, state: dict[str, Tensor]) -> None:
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if name not in state:
            raise ConfigError(f"the checkpoint has nothing for {name}")
        if state[name].shape != parameter.shape:
            raise ConfigError(
                f"{name} is {tuple(parameter.shape)} by the arguments, {tuple(state[name].shape)} in file"
            )
        with torch.no_grad():
            parameter.copy_(state[name])


def _config_of(args: Namespace, tensors: dict[str, Tensor], options: dict[str, object]) -> RemoeConfig:
    for name, needed in REQUIRED.items():
        value = getattr(args, name, needed)
        if value != needed and not isinstance(value, Inert):
            raise ConfigError(f"a Megatron model with {name} = {value!r} has no ReMoE counterpart (needs {needed!r})")
    heads = int(argument(args, "num_attention_heads"))
    grouped = argument(args, "group_query_attention", False)
    embedding = tensors.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise ConfigError("the checkpoint has no embedding.word_embeddings.weight")
    D = int(argument(args, "hidden_size"))
    if embedding.shape[1] != D:
        raise ConfigError(f"hidden_size is {D} by the checkpoint's arguments, {embedding.shape[1]} by its embedding")
    shared = tensors.get("decoder.layers.0.mlp.shared_experts.linear_fc2.weight")
    fields = {
        "vocab_size": embedding.shape[0],
        "hidden_size": D,
        "intermediate_size": expert_width(args) * int(argument(args, "moe_granularity", 1)),
        "num_hidden_layers": int(argument(args, "num_layers")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(argument(args, "num_query_groups")) if grouped else heads,
        "head_dim": int(argument(args, "kv_channels", None) or D // heads),
        "max_position_embeddings": int(argument(args, "max_position_embeddings")),
        "initializer_range": float(argument(args, "init_method_std", 0.02)),
        "rms_norm_eps": float(argument(args, "norm_epsilon", 1e-5)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(argument(args, "rotary_base", 10_000))},
        "tie_word_embeddings": not argument(args, "untie_embeddings_and_output_weights", False),
        "qk_norm": bool(argument(args, "qk_layernorm", False)),
        "num_experts": int(argument(args, "num_experts")),
        "num_experts_per_tok": int(argument(args, "moe_router_topk", 2)),
        "granularity": int(argument(args, "moe_granularity", 1)),
        "shared_expert_size": 0 if shared is None else shared.shape[1],
        "regularizer_normalization": "official",
        "sparsity": {
            "rule": "official",
            "lambda_init": float(argument(args, f"{LAMBDA}_init", 1e-8)),
            "alpha": float(argument(args, f"{LAMBDA}_multiplier", 1.2)),
        },
    }
    check_fields(options)
    take_todays_names(options, "relu")
    fields |= options | {"sparsity": fields["sparsity"] | (options.get("sparsity") or {})}
    config = RemoeConfig(**fields)
    if "lambda_init" not in (options.get("sparsity") or {}):
        config.sparsity["lambda_init"] /= _over_ours(config)
    return config


def _check_exportable(model: RemoeForCausalLM) -> None:
    config = model.config
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    lacking = {
        f"router {config.router!r}": config.router_class is not ReLURouter,
        f"router_options {config.router_options}": bool(config.router_options),
        "attention_bias": config.attention_bias,
        f"rope_type {rope_type!r}": rope_type != "default",
    }
    for what, found in lacking.items():
        if found:
            raise ConfigError(f"the authors' code has no counterpart of {what}")


def _over_ours(config: RemoeConfig) -> float:
    """Their lambda over ours: they sum the penalty over the layers, where "paper" takes the mean."""
    return 1 / config.num_hidden_layers if config.regularizer_normalization == "paper" else 1.0


def _args_of(config: RemoeConfig, ranks: Ranks, experts: str) -> dict[str, object]:
    same = {name: value for name, value in REQUIRED.items() if name != "virtual_pipeline_model_parallel_size"}
    lam = {
        f"{LAMBDA}_init": config.sparsity["lambda_init"] * _over_ours(config),
        f"{LAMBDA}_multiplier": config.sparsity["alpha"],
    }
    return (
        same
        | lam
        | {
            "padded_vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "moe_ffn_hidden_size": config.intermediate_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "seq_length": config.max_position_embeddings,
            "add_position_embedding": False,
            "init_method_std": config.initializer_range,
            "norm_epsilon": config.rms_norm_eps,
            "rotary_base": config.rope_parameters["rope_theta"],
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "qk_layernorm": config.qk_norm,
            "num_experts": config.num_experts,
            "moe_router_topk": config.k,
            "moe_granularity": config.granularity,
            "moe_shared_expert_intermediate_size": config.shared_expert_size or None,
            "moe_grouped_gemm": experts != "sequential",
            "moe_use_legacy_grouped_gemm": experts == "grouped",
            "tensor_model_parallel_size": ranks.tensor,
            "pipeline_model_parallel_size": ranks.pipeline,
            "expert_model_parallel_size": ranks.expert,
            "expert_tensor_parallel_size": ranks.tensor,
            "ckpt_format": "torch",
            "tokenizer_type": "GPT2BPETokenizer",
            "make_vocab_size_divisible_by": 1024,
        }
    )
