"""Files of Megatron's checkpoints: read and joined from the ranks that wrote them, cut and written for others.

A checkpoint is one dictionary of whole tensors by Megatron's names, with layers counted over all pipeline stages and
the experts of a layer stacked: `FC1` (E, 2 F, D), `FC2` (E, D, F). Format "torch_dist" holds that as it is; format
"torch" has a file for each rank.

Legend: D model width, F expert width, E experts (times granularity), tp, pp, ep ranks; t, p, e one of them.
"""

import warnings
from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from remoe.convert.megatron.inert_pickle import InertReader, read_torch_file
from remoe.convert.megatron.names import FC1, FC2
from remoe.errors import ConfigError

LAMBDA = "moe_relu_l1_reg_coeff"
TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
EXPERT_LAYOUTS = ("te_grouped", "grouped", "sequential")
# The dimension that tensor parallelism cuts; fc1 is cut within its two halves, gate and up.
CUT_DIM = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


@dataclass(frozen=True)
class Ranks:
    """How many ranks of each kind a checkpoint is cut for."""

    tensor: int
    pipeline: int
    expert: int


def read_checkpoint(folder: Path, iteration: int | None) -> tuple[Path, Namespace, dict[str, Tensor]]:
    """Reads a checkpoint of either format.

    Args:
        folder: with the tracker file, or that of an iteration.
        iteration: which one; the newest by default.

    Returns:
        The folder of the iteration; Megatron's arguments; the whole tensors, with lambda, if any, as `LAMBDA`.

    Raises:
        ConfigError: when it is missing or incomplete.
    """
    path = _iteration_folder(folder, iteration)
    args, tensors = (_read_torch_dist if (path / ".metadata").is_file() else _read_torch)(path)
    return path, args, tensors


def write_checkpoint(
    folder: Path, iteration: int, args: Namespace, tensors: dict[str, Tensor], ranks: Ranks, layout: str
) -> Path:
    """Writes a checkpoint of format "torch".

    Args:
        folder: a new or empty one.
        iteration: the number that it is given.
        args: Megatron's arguments, to record.
        tensors: whole ones, with lambda as `LAMBDA`.
        ranks: which divide the sizes.
        layout: of the experts, one of `EXPERT_LAYOUTS`.

    Returns:
        The folder of the iteration.

    Raises:
        ConfigError: when the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty")
    path = folder / f"iter_{iteration:07d}"
    for t, p, e in product(range(ranks.tensor), range(ranks.pipeline), range(ranks.expert)):
        state = _cut(tensors, int(argument(args, "num_layers")), ranks, (t, p, e), layout)
        target = path / _rank_folder(ranks, t, p, e) / FILE
        target.parent.mkdir(parents=True)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": iteration, "model": state}, target)
    (folder / TRACKER).write_text(str(iteration))
    return path


def argument(args: Namespace, name: str, default: object = ...) -> object:
    """One of Megatron's arguments.

    Raises:
        ConfigError: when it is missing and has no default.
    """
    value = getattr(args, name, default)
    if value is ...:
        raise ConfigError(f"the checkpoint's arguments lack {name}")
    return value


def expert_width(args: Namespace) -> int:
    """F, the width of one expert."""
    width = argument(args, "moe_ffn_hidden_size", None) or argument(args, "ffn_hidden_size")
    return int(width) // int(argument(args, "moe_granularity", 1))


def _iteration_folder(folder: Path, iteration: int | None) -> Path:
    if folder.name.startswith("iter_") and iteration is None:
        path = folder
    elif iteration is not None:
        path = folder / f"iter_{iteration:07d}"
    elif not (folder / TRACKER).is_file():
        raise ConfigError(f"{folder} holds no checkpoint of Megatron: {TRACKER} is missing")
    else:
        newest = (folder / TRACKER).read_text(errors="replace").strip()
        if newest != "release" and not newest.isdecimal():
            raise ConfigError(f"{folder / TRACKER} names no iteration but {newest!r}")
        path = folder / (newest if newest == "release" else f"iter_{int(newest):07d}")
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}")
    return path


def _rank_folder(ranks: Ranks, t: int, p: int, e: int) -> str:
    """A rank's folder; Megatron numbers pipeline and expert ranks only where there are several."""
    numbers = [rank for rank, count in ((p, ranks.pipeline), (e, ranks.expert)) if count > 1]
    return f"mp_rank_{t:02d}" + "".join(f"_{number:03d}" for number in numbers)


def _read_torch(path: Path) -> tuple[Namespace, dict[str, Tensor]]:
    files = sorted(path.glob(f"mp_rank_*/{FILE}"))
    if not files:
        raise ConfigError(f"{path} holds neither mp_rank_*/{FILE} nor .metadata")
    args = _args_in(read_torch_file(files[0]), files[0])
    kinds = ("tensor_model", "pipeline_model", "expert_model")
    ranks = Ranks(*(int(argument(args, f"{kind}_parallel_size", 1)) for kind in kinds))
    tp = ranks.tensor
    if argument(args, "expert_tensor_parallel_size", tp) not in (None, tp):
        raise ConfigError("expert_tensor_parallel_size other than tensor_model_parallel_size is not supported")
    tensors: dict[str, Tensor] = {}
    per_stage, rest = divmod(int(argument(args, "num_layers")), ranks.pipeline)
    if rest:
        raise ConfigError(f"{ranks.pipeline} pipeline stages with different numbers of layers are not supported")
    for p in range(ranks.pipeline):
        states = [
            [_rank_state(path / _rank_folder(ranks, t, p, e) / FILE) for e in range(ranks.expert)] for t in range(tp)
        ]
        experts = [[_pop_experts(state, args, tp) for state in row] for row in states]
        for i, names in experts[0][0].items():
            for name in names:
                by_rank = [torch.cat([own[i][name] for own in row]) for row in experts]
                tensors[f"decoder.layers.{i + p * per_stage}.{name}"] = _join(name, by_rank, lead=1)
        for name in states[0][0]:
            tensors[_renumbered(name, p * per_stage)] = _join(name, [row[0][name] for row in states])
    return args, tensors


def _args_in(data: dict, path: Path) -> Namespace:
    if not isinstance(data.get("args"), Namespace):
        raise ConfigError(f"{path} has no `args`: it is no checkpoint of Megatron")
    return data["args"]


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
    width = expert_width(args) // tp
    D = int(argument(args, "hidden_size"))
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
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException, of what went wrong in each process
            reasons = [failure[0] for failure in error.failures.values()]
            for reason in reasons:
                if not isinstance(reason, Exception):  # Ctrl-C
                    raise reason from error
            raise ConfigError(f"{path} cannot be read: {' '.join(str(reasons[0]).split())}") from error
    # Plain buffers, lambda among them, are saved beside the arguments.
    for source in (common, common.get("model", {})):
        if isinstance(source, dict) and isinstance(source.get(LAMBDA), Tensor):
            tensors[LAMBDA] = source[LAMBDA]
    return args, {name.replace(".mlp.experts.experts.", ".mlp.experts."): value for name, value in tensors.items()}


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
    tensors: dict[str, Tensor], num_layers: int, ranks: Ranks, rank: tuple[int, int, int], layout: str
) -> dict[str, Tensor | None]:
    """The state of one rank (tensor, pipeline, expert)."""
    t, p, e = rank
    per_stage = num_layers // ranks.pipeline
    state: dict[str, Tensor | None] = {LAMBDA: tensors[LAMBDA].clone()}
    for name, whole in tensors.items():
        if name == LAMBDA:
            continue
        if name.startswith("decoder.layers."):
            if int(name.split(".")[2]) // per_stage != p:
                continue
        elif p != (0 if name.startswith("embedding.") else ranks.pipeline - 1):
            continue
        local = _renumbered(name, -p * per_stage)
        if name.endswith((FC1, FC2)):
            own = _part(name, whole.chunk(ranks.expert)[e], t, ranks.tensor, lead=1)
            state |= _expert_entries(local, own, layout)
        else:
            state[local] = _part(name, whole, t, ranks.tensor).contiguous().clone()
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
