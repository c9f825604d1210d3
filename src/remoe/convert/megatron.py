"""Checkpoints of the authors' ReMoE code, a fork of Megatron-LM: `load_megatron` and `save_megatron`.

Between the two lies one dictionary of whole tensors by Megatron's names, with layers counted over all pipeline stages
and the experts of a layer stacked: `mlp.experts.linear_fc1.weight` (E, 2 F, D), `linear_fc2.weight` (E, D, F). That is
what format "torch_dist" holds as it is; format "torch" is joined from, or cut into, a file for each rank.

Legend: D model width, F expert width, E experts (times granularity), V vocabulary, tp, pp, ep ranks.
"""

import warnings
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from remoe.convert.inert_pickle import Inert, InertReader, read_torch_file
from remoe.errors import ConfigError
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM

LAMBDA = "moe_relu_l1_reg_coeff"
TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
EXPERT_LAYOUTS = ("te_grouped", "grouped", "sequential")
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
# The dimension that tensor parallelism cuts; fc1 is cut within its two halves, gate and up.
CUT_DIM = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}
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
    checkpoint's; the penalty is summed over layers and steered as in their code (`regularizer_normalization` and
    `sparsity_rule` "official"). Optimiser states are not read.

    Args:
        folder: what `--save` named, with `latest_checkpointed_iteration.txt`, or an `iter_...` folder in it.
        iteration: which one; the newest by default.
        options: further fields of `RemoeConfig`.

    Returns:
        The model, for evaluation, in the checkpoint's dtype. Its vocabulary is Megatron's padded one.

    Raises:
        ConfigError: when there is no such checkpoint, it is incomplete, or the model is of another kind; naming what.
    """
    path = _iteration_folder(Path(folder), iteration)
    args, tensors = (_read_torch_dist if (path / ".metadata").is_file() else _read_torch)(path)
    lam = tensors.pop(LAMBDA, None)
    if lam is None:
        raise ConfigError(f"{path} has no {LAMBDA}: it was not trained with --moe-relu-routing")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_pos_emb.inv_freq")}
    config = _config_of(args, tensors, options)
    state = _to_ours(tensors, config)
    model = RemoeForCausalLM(config).to(state["model.embed_tokens.weight"].dtype)
    _fill(model, state)
    model.sparsity.lam.copy_(lam)
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
    config, tp, pp, ep = model.config, tensor_parallel, pipeline_parallel, expert_parallel
    if experts not in EXPERT_LAYOUTS:
        raise ConfigError(f"unknown layout of experts {experts!r}; choose one of: {', '.join(EXPERT_LAYOUTS)}")
    _check_exportable(model)
    sizes = {
        "num_key_value_heads": (config.num_key_value_heads, tp),
        "vocab_size": (config.vocab_size, tp),
        "num_hidden_layers": (config.num_hidden_layers, pp),
        "the number of experts": (config.num_experts * config.granularity, ep),
        "the width of an expert": (config.intermediate_size // config.granularity, tp),
        "shared_expert_size": (config.shared_expert_size, tp),
    }
    for name, (size, ranks) in sizes.items():
        if ranks < 1 or size % ranks:
            raise ConfigError(f"{ranks} ranks do not divide {name} = {size}")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty")
    path = folder / f"iter_{iteration:07d}"
    recorded = Namespace(**(_args_of(config, tp, pp, ep, experts) | (args or {})))
    tensors = _from_ours(model)
    for p in range(pp):
        for t in range(tp):
            for e in range(ep):
                state = _cut(tensors, config, (t, tp), (p, pp), (e, ep), experts)
                state[LAMBDA] = model.sparsity.lam.detach().cpu().clone()
                target = path / _rank_folder(t, p if pp > 1 else None, e if ep > 1 else None) / FILE
                target.parent.mkdir(parents=True)
                data = {"args": recorded, "checkpoint_version": 3.0, "iteration": iteration, "model": state}
                torch.save(data, target)
    (folder / TRACKER).write_text(str(iteration))
    return path


# --- finding and reading ---------------------------------------------------------------------------------------------


def _iteration_folder(folder: Path, iteration: int | None) -> Path:
    if folder.name.startswith("iter_") and iteration is None:
        path = folder
    elif iteration is not None:
        path = folder / f"iter_{iteration:07d}"
    elif not (folder / TRACKER).is_file():
        raise ConfigError(f"{folder} holds no checkpoint of Megatron: {TRACKER} is missing")
    else:
        newest = (folder / TRACKER).read_text().strip()
        if newest != "release" and not newest.isdecimal():
            raise ConfigError(f"{folder / TRACKER} names no iteration but {newest!r}")
        path = folder / (newest if newest == "release" else f"iter_{int(newest):07d}")
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}")
    return path


def _rank_folder(t: int, p: int | None, e: int | None) -> str:
    return f"mp_rank_{t:02d}" + "".join(f"_{rank:03d}" for rank in (p, e) if rank is not None)


def _read_torch(path: Path) -> tuple[Namespace, dict[str, Tensor]]:
    files = sorted(path.glob(f"mp_rank_*/{FILE}"))
    if not files:
        raise ConfigError(f"{path} holds neither mp_rank_*/{FILE} nor .metadata")
    args = _args_in(read_torch_file(files[0]), files[0])
    tp, pp = (int(_argument(args, f"{kind}_model_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    ep = int(_argument(args, "expert_model_parallel_size", 1))
    if _argument(args, "expert_tensor_parallel_size", tp) not in (None, tp):
        raise ConfigError("expert_tensor_parallel_size other than tensor_model_parallel_size is not supported")
    tensors: dict[str, Tensor] = {}
    per_stage, rest = divmod(int(_argument(args, "num_layers")), pp)
    if rest:
        raise ConfigError(f"{pp} pipeline stages with different numbers of layers are not supported")
    for p in range(pp):
        states = [
            [
                _rank_state(path / _rank_folder(t, p if pp > 1 else None, e if ep > 1 else None) / FILE)
                for e in range(ep)
            ]
            for t in range(tp)
        ]
        experts = [[_pop_experts(state, args, tp) for state in row] for row in states]
        for i, names in experts[0][0].items():
            for name in names:
                by_rank = [torch.cat([experts[t][e][i][name] for e in range(ep)]) for t in range(tp)]
                tensors[f"decoder.layers.{i + p * per_stage}.{name}"] = _join(name, by_rank, lead=1)
        for name in states[0][0]:
            tensors[_renumbered(name, p * per_stage)] = _join(name, [states[t][0][name] for t in range(tp)])
    return args, tensors


def _args_in(data: dict, path: Path) -> Namespace:
    if not isinstance(data.get("args"), Namespace):
        raise ConfigError(f"{path} has no `args`: it is no checkpoint of Megatron")
    return data["args"]


def _argument(args: Namespace, name: str, default: object = ...) -> object:
    value = getattr(args, name, default)
    if value is ...:
        raise ConfigError(f"the checkpoint's arguments lack {name}")
    return value


def _rank_state(path: Path) -> dict[str, Tensor]:
    """The model's tensors in one rank's file."""
    if not path.is_file():
        raise ConfigError(f"the checkpoint is incomplete: {path} is missing")
    state = read_torch_file(path).get("model")
    if not isinstance(state, dict):
        raise ConfigError(f"{path} has no `model`")
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} in {path} is no tensor")
    return state


def _pop_experts(state: dict[str, Tensor], args: Namespace, tp: int) -> dict[int, dict[str, Tensor]]:
    """Takes a rank's experts out of its state; by layer of the stage, `FC1` (e, 2 F / tp, D), `FC2` (e, D, F / tp)."""
    found: dict[int, dict[str, dict[int, Tensor] | Tensor]] = {}
    width = _expert_width(args) // tp
    D = int(_argument(args, "hidden_size"))
    for name in [name for name in state if ".mlp.experts." in name]:
        layer, part = name.removeprefix("decoder.layers.").split(".mlp.experts.")
        parts = found.setdefault(int(layer), {})
        tensor, words = state.pop(name), part.split(".")
        if part in ("weight1", "weight2") and tensor.numel() % (D * width):
            raise ConfigError(f"{name} is {tuple(tensor.shape)}, which holds no experts of width {width}")
        if part == "weight1":
            parts[FC1] = tensor.view(-1, D, 2 * width).transpose(1, 2)
        elif part == "weight2":
            parts[FC2] = tensor.view(-1, width, D).transpose(1, 2)
        elif words[0] == "local_experts" and words[2:] in (["linear_fc1", "weight"], ["linear_fc2", "weight"]):
            parts.setdefault(f"mlp.experts.{words[2]}.weight", {})[int(words[1])] = tensor
        elif words[0] in ("linear_fc1", "linear_fc2") and (number := words[-1].removeprefix("weight")).isdecimal():
            parts.setdefault(f"mlp.experts.{words[0]}.weight", {})[int(number)] = tensor
        else:
            raise ConfigError(f"{name} has no counterpart in a ReMoE model")
    return {i: {name: _stacked(value) for name, value in parts.items()} for i, parts in found.items()}


def _stacked(value: dict[int, Tensor] | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.stack([value[i] for i in range(len(value))])


def _read_torch_dist(path: Path) -> tuple[Namespace, dict[str, Tensor]]:
    common = read_torch_file(path / "common.pt") if (path / "common.pt").is_file() else {}
    args = _args_in(common, path / "common.pt")
    reader = InertReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(("embedding.", "decoder.", "output_layer.")) and hasattr(entry, "chunks")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    # Plain buffers, lambda among them, are saved beside the arguments.
    for source in (common, common.get("model", {})):
        if isinstance(source, dict) and isinstance(source.get(LAMBDA), Tensor):
            tensors[LAMBDA] = source[LAMBDA]
    return args, {name.replace(".mlp.experts.experts.", ".mlp.experts."): value for name, value in tensors.items()}


# --- cutting and joining ----------------------------------------------------------------------------------------------


def _cut_dim(name: str) -> int | None:
    return next((dim for suffix, dim in CUT_DIM.items() if name.endswith(suffix)), None)


def _join(name: str, parts: list[Tensor], lead: int = 0) -> Tensor:
    """Whole tensor from those of the tensor parallel ranks; `lead` dimensions stand before the cut ones."""
    dim = _cut_dim(name)
    if dim is None or len(parts) == 1:
        return parts[0]
    if not name.endswith("linear_fc1.weight"):
        return torch.cat(parts, dim=dim + lead)
    halves = [part.chunk(2, dim=lead) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=lead)


def _part(name: str, whole: Tensor, rank: int, ranks: int, lead: int = 0) -> Tensor:
    """What `_join` puts together."""
    dim = _cut_dim(name)
    if dim is None or ranks == 1:
        return whole
    if not name.endswith("linear_fc1.weight"):
        return whole.chunk(ranks, dim=dim + lead)[rank]
    return torch.cat([half.chunk(ranks, dim=lead)[rank] for half in whole.chunk(2, dim=lead)], dim=lead)


def _renumbered(name: str, offset: int) -> str:
    if not name.startswith("decoder.layers."):
        return name
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{int(layer) + offset}.{rest}"


def _cut(
    tensors: dict[str, Tensor],
    config: RemoeConfig,
    tensor: tuple[int, int],
    pipeline: tuple[int, int],
    expert: tuple[int, int],
    layout: str,
) -> dict[str, Tensor | None]:
    """The state of one rank, given as (rank, ranks) of each kind."""
    (t, tp), (p, pp), (e, ep) = tensor, pipeline, expert
    per_stage = config.num_hidden_layers // pp
    state: dict[str, Tensor | None] = {}
    for name, whole in tensors.items():
        if name.startswith("decoder.layers."):
            layer = int(name.split(".")[2])
            if layer // per_stage != p:
                continue
        elif p != (0 if name.startswith("embedding.") else pp - 1):
            continue
        local = _renumbered(name, -p * per_stage)
        if name.endswith((FC1, FC2)):
            own = _part(name, whole.chunk(ep)[e], t, tp, lead=1)
            state |= _expert_entries(local, own, layout)
        else:
            state[local] = _part(name, whole, t, tp).contiguous().clone()
    # Transformer Engine's modules expect a state of their own beside the weights; None means nothing to restore.
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    if layout == "te_grouped":
        modules += ["mlp.experts.linear_fc1", "mlp.experts.linear_fc2"]
    state |= {f"decoder.layers.{i}.{m}._extra_state": None for i in range(per_stage) for m in modules}
    return state


def _expert_entries(name: str, own: Tensor, layout: str) -> dict[str, Tensor]:
    """A rank's experts (e, out, in) of one projection, by the names of a layout."""
    prefix, part = name.split("mlp.experts.")
    linear = part.removesuffix(".weight")
    prefix += "mlp.experts."
    if layout == "grouped":
        flat = own.transpose(1, 2).contiguous()  # (e, D, 2 F / tp) or (e, F / tp, D), seen as a matrix
        if linear == "linear_fc1":
            return {prefix + "weight1": flat.view(flat.shape[1], -1)}
        return {prefix + "weight2": flat.view(-1, flat.shape[2])}
    form = "local_experts.{i}.{linear}.weight" if layout == "sequential" else "{linear}.weight{i}"
    return {prefix + form.format(i=i, linear=linear): weight.clone() for i, weight in enumerate(own)}


# --- names ------------------------------------------------------------------------------------------------------------


def _qkv_shape(config: RemoeConfig) -> tuple[int, int, int]:
    """(groups, heads of a group with its key and its value, head width)."""
    groups = config.num_key_value_heads
    return groups, config.num_attention_heads // groups + 2, config.head_dim


def _to_ours(tensors: dict[str, Tensor], config: RemoeConfig) -> dict[str, Tensor]:
    """State dict of `RemoeForCausalLM`; every tensor must be used."""
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


def _from_ours(model: RemoeForCausalLM) -> dict[str, Tensor]:
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


# --- configuration ----------------------------------------------------------------------------------------------------


def _expert_width(args: Namespace) -> int:
    width = _argument(args, "moe_ffn_hidden_size", None) or _argument(args, "ffn_hidden_size")
    return int(width) // int(_argument(args, "moe_granularity", 1))


def _config_of(args: Namespace, tensors: dict[str, Tensor], options: dict[str, object]) -> RemoeConfig:
    for name, wanted in REQUIRED.items():
        value = getattr(args, name, wanted)
        if value != wanted and not isinstance(value, Inert):
            raise ConfigError(f"a Megatron model with {name} = {value!r} has no ReMoE counterpart (needs {wanted!r})")
    heads = int(_argument(args, "num_attention_heads"))
    grouped = _argument(args, "group_query_attention", False)
    embedding = tensors.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise ConfigError("the checkpoint has no embedding.word_embeddings.weight")
    D = int(_argument(args, "hidden_size"))
    if embedding.shape[1] != D:
        raise ConfigError(f"hidden_size is {D} by the checkpoint's arguments, {embedding.shape[1]} by its embedding")
    shared = tensors.get("decoder.layers.0.mlp.shared_experts.linear_fc2.weight")
    fields = {
        "vocab_size": embedding.shape[0],
        "hidden_size": D,
        "intermediate_size": _expert_width(args) * int(_argument(args, "moe_granularity", 1)),
        "num_hidden_layers": int(_argument(args, "num_layers")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_argument(args, "num_query_groups")) if grouped else heads,
        "head_dim": int(_argument(args, "kv_channels", None) or D // heads),
        "max_position_embeddings": int(_argument(args, "max_position_embeddings")),
        "initializer_range": float(_argument(args, "init_method_std", 0.02)),
        "rms_norm_eps": float(_argument(args, "norm_epsilon", 1e-5)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(_argument(args, "rotary_base", 10_000))},
        "tie_word_embeddings": not _argument(args, "untie_embeddings_and_output_weights", False),
        "qk_norm": bool(_argument(args, "qk_layernorm", False)),
        "num_experts": int(_argument(args, "num_experts")),
        "num_experts_per_tok": int(_argument(args, "moe_router_topk", 2)),
        "granularity": int(_argument(args, "moe_granularity", 1)),
        "shared_expert_size": 0 if shared is None else shared.shape[1],
        "regularizer_normalization": "official",
        "sparsity_rule": "official",
        "lambda_init": float(_argument(args, f"{LAMBDA}_init", 1e-8)),
        "lambda_alpha": float(_argument(args, f"{LAMBDA}_multiplier", 1.2)),
    }
    return RemoeConfig(**(fields | options))


def _check_exportable(model: RemoeForCausalLM) -> None:
    config = model.config
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    lacking = {
        f"router {config.router!r}": config.router != "relu",
        f"router_options {config.router_options}": bool(config.router_options),
        "load_balance = False": not config.load_balance,
        "max_experts_per_token": config.max_experts_per_token is not None,
        "attention_bias": config.attention_bias,
        f"rope_type {rope_type!r}": rope_type != "default",
    }
    for what, found in lacking.items():
        if found:
            raise ConfigError(f"the authors' code has no counterpart of {what}")


def _args_of(config: RemoeConfig, tp: int, pp: int, ep: int, experts: str) -> dict[str, object]:
    same = {name: value for name, value in REQUIRED.items() if name != "virtual_pipeline_model_parallel_size"}
    lam = {f"{LAMBDA}_init": config.lambda_init, f"{LAMBDA}_multiplier": config.lambda_alpha}
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
            "moe_router_topk": config.num_experts_per_tok,
            "moe_granularity": config.granularity,
            "moe_shared_expert_intermediate_size": config.shared_expert_size or None,
            "moe_grouped_gemm": experts != "sequential",
            "moe_use_legacy_grouped_gemm": experts == "grouped",
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": tp,
            "ckpt_format": "torch",
            "tokenizer_type": "GPT2BPETokenizer",
            "make_vocab_size_divisible_by": 1024,
        }
    )
