"""Checkpoints. A crash at any moment, even during a write, leaves the previous checkpoint whole.

A checkpoint is a folder `step-00000200` that transformers can load (`config.json`, `model.safetensors`), with
`training.safetensors` (optimiser moments, random state) and `training.json` (step, fingerprint of the data). No pickle.
`checksums.json` has the sha256 of each of these files, and of the run's tokenizer: together they are one checkpoint.
A run of several processes writes `shards.json` and a file for each rank instead of the two safetensors files, see
`shards.py` and `saving.py`.
"""

import hashlib
import json
import shutil
from operator import index
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe.errors import CheckpointError, DataError
from remoe.lab.files import TEMPORARY, remove_whole, replacing
from remoe.lab.training.config import CheckpointOptions
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.shards import INDEX, Stored, fill, model_files, opened
from remoe.models.sharding import like, shard_of

T = TypeVar("T")
_PREFIX = "step-"
_LEFT_OVERS = (f".*{TEMPORARY}", ".partial-*")  # of a process that was killed: today's names, and those of 0.1.0
_COST = ("seconds", "peak_memory_bytes")  # 0 in old checkpoints, which do not have them
CHECKSUMS = "checksums.json"
_TOKENIZER = "tokenizer"  # a folder of the run
_HASH_BYTES = 1 << 24
_RNG_CPU, _RNG_CUDA, _COURSE = "rng.cpu", "rng.cuda", "course_of_sparsity"
OF_RANK_0 = (_RNG_CPU, _RNG_CUDA)  # differ between ranks; `Ranks.begin_step` sets those of the others
_OPTIMISER = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what AdamW and Muon keep of a parameter
_TRAINED = "trained."  # before the name of a tensor of a model with adapters


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their names, oldest first; `check_whole` tells whether one is damaged."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit())


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[len(_PREFIX) :])


def saved_step(path: Path) -> int:
    """The step at which a checkpoint was saved, from its content: the folder may have been renamed.

    Raises:
        CheckpointError: when `training.json` is missing or damaged.
    """
    try:
        return index(json.loads((path / "training.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / 'training.json'} is missing or damaged ({error})") from error


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: dict[str, object],
    course_of_sparsity: list[float],
    *,
    merged: dict[str, Tensor] | None = None,
    trained: dict[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint of one process atomically and durably; `ShardedSaving` writes those of several.

    Args:
        folder: the run's `checkpoints`.
        step: optimiser steps done.
        model: with `save_pretrained`.
        optimizer: over `model`'s parameters.
        info: small JSON values, such as the fingerprint of the data.
        course_of_sparsity: S of each step so far.
        merged: of a model with adapters, the weights to write in place of the model's own.
        trained: of such a model, the tensors that training changes, which are kept beside the optimiser's state.

    Raises:
        CheckpointError: when it cannot be written, for example because the disk is full; earlier checkpoints are
            untouched.
    """
    final = checkpoint_path(folder, step)
    tensors = training_tensors(model, optimizer, course_of_sparsity)
    tensors |= {f"{_TRAINED}{name}": tensor for name, tensor in (trained or {}).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_whole(final)  # damaged, otherwise the run would have been resumed from it
        with replacing(final) as partial:
            if merged is None:
                model.save_pretrained(partial)
            else:
                _without_adapters(model).save_pretrained(partial, state_dict=merged)
            save_file(tensors, partial / "training.safetensors")
            write_info(partial, step, info)
            parts = {path.name: path for path in partial.iterdir()} | tokenizer_files(folder.parent)
            write_checksums(partial, {name: sha256(path) for name, path in parts.items()})
    except (OSError, DataError, SafetensorError) as error:
        raise cannot_write(final, error) from error
    return final


def _without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration on the meta device, which saves the weights that it is given."""
    with torch.device("meta"):
        return type(model)(type(model.config).from_dict(model.config.to_dict()))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, in a run's folder of checkpoints."""
    return folder / f"{_PREFIX}{step:08d}"


def write_info(partial: Path, step: int, info: dict[str, object]) -> None:
    """Writes `training.json`."""
    (partial / "training.json").write_text(json.dumps({"step": step, **info}, indent=2))


def write_checksums(partial: Path, checksums: dict[str, str]) -> None:
    """Writes `checksums.json`: the sha256 of each file by its name."""
    (partial / CHECKSUMS).write_text(json.dumps(dict(sorted(checksums.items())), indent=2))


def cannot_write(final: Path, error: Exception, who: str = "") -> CheckpointError:
    """The error for a checkpoint that cannot be written, where `who` says by which rank."""
    kept = list_checkpoints(final.parent)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
    reason = " ".join(str(error.__cause__ or error).split())
    return CheckpointError(f"cannot write checkpoint {final}: {who}{reason}; {last}")


def load_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor] | None = None
) -> tuple[dict[str, object], list[float]]:
    """Restores weights, buffers, optimiser and random state in place.

    Args:
        path: the checkpoint.
        model, optimizer: as they were given to `save_checkpoint`.
        weights: the model's state dict, where the checkpoint's files have other names; by default they are read.

    Returns:
        `info` as given to `save_checkpoint`, with "step"; and S of each step so far.

    Raises:
        CheckpointError: when a file is missing or unreadable, or tensors do not fit the model. `verify` finds damage.
    """
    try:
        info = json.loads((path / "training.json").read_text())
        with opened(path) as (stored, state):
            prefix = len(_TRAINED)
            if trained := {name[prefix:]: state[name][...] for name in state if name.startswith(_TRAINED)}:
                weights = model.state_dict() | trained  # the others are frozen, and as the model has them
            if weights is None:
                fill(model, stored, path)
            else:
                _fill_whole(model, weights, path)
            _restore_training(state, model, optimizer)
            course = state[_COURSE][...].tolist()
        known = {"step": index(info["step"]), "data": info["data"], "stream": info.get("stream")}
        info = known | {name: info.get(name, 0) for name in _COST}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"cannot load checkpoint {path}: {message}") from error
    return info, course


def _fill_whole(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if wrong := [*(set(missing) - tied), *unexpected]:
        raise CheckpointError(f"checkpoint {path} does not fit the model: {', '.join(wrong[:3])}")


def _restore_training(state: dict[str, Stored], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.set_rng_state(state[_RNG_CPU][...])
    device = next(model.parameters()).device
    if device.type == "cuda" and _RNG_CUDA in state:
        torch.cuda.set_rng_state(state[_RNG_CUDA][...], device)
    for name, parameter in model.named_parameters():
        for key in _OPTIMISER:
            if (stored := state.get(f"{name}.{key}")) is None:  # it had no gradient yet, or another optimiser
                continue
            # Fused AdamW keeps its step counter beside the parameter.
            whole = key == "step"
            value = stored[...].to(parameter.device) if whole else like(shard_of(stored, parameter), parameter)
            optimizer.state[parameter][key] = value


def clean(folder: Path, newest: int, options: CheckpointOptions, kept: int | None = None) -> None:
    """Deletes left-overs, and checkpoints up to step `newest` but the last `keep`, those every `keep_every` steps and
    that of step `kept`.

    Folders of later steps stay: they are damaged, or a user's.
    """
    for pattern in _LEFT_OVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in list_checkpoints(folder) if checkpoint_step(path) <= newest][: -options.keep]:
        step = checkpoint_step(path)
        if step != kept and not (options.keep_every and step % options.keep_every == 0):
            remove_whole(path)


def verify(path: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Compares every file of a checkpoint, and the tokenizer of its run, with the checksums that were saved with it.

    A checkpoint of version 0.1.0 has no checksums; only the headers of its weights are read.

    Args:
        path: the checkpoint.
        part: (rank, ranks), where several ranks share the files among them; all of them by default.

    Raises:
        CheckpointError: naming a file that is missing, damaged, or of another checkpoint.
    """
    check_weights(path, part)
    listed = path / CHECKSUMS
    if not listed.exists():
        return
    try:
        checksums = json.loads(listed.read_bytes())
        if not isinstance(checksums, dict) or not checksums:
            raise ValueError("not a list of checksums")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{listed} is damaged ({error})") from error
    in_run = (path.parent.parent / _TOKENIZER).is_dir()  # a checkpoint may be copied out of its run
    for name, expected in _share(list(checksums.items()), part):
        inside = name.startswith(f"{_TOKENIZER}/")
        if inside and not in_run:
            continue
        file = (path.parent.parent if inside else path) / name
        try:
            found = sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}), but belongs to {path}") from error
        if found != expected:
            raise CheckpointError(f"{file} is damaged, or of another checkpoint than {path}: its checksum differs")
    if foreign := sorted({file.name for file in path.glob("*.safetensors")} - checksums.keys()):
        raise CheckpointError(f"{path / foreign[0]} does not belong to this checkpoint")


def check_whole(path: Path, *, verified: bool, part: tuple[int, int] = (0, 1)) -> None:
    """Raises CheckpointError if a run cannot be resumed from a checkpoint.

    Args:
        path: the checkpoint.
        verified: also `verify` it, which reads all of it; otherwise only whether all files and headers are there.
        part: see `verify`.
    """
    if verified:
        verify(path, part)
    else:
        check_weights(path, part)
    saved_step(path)
    for name in ("config.json", *(() if (path / INDEX).exists() else ("training.safetensors",))):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        if name.endswith(".safetensors"):
            _check_header(path / name)


def newest_whole(
    folder: Path, *, verified: bool, ranks: Ranks | None = None
) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that `check_whole` accepts, and what is wrong with each newer one; None without any.

    Args:
        folder: the run's `checkpoints`.
        verified: see `check_whole`.
        ranks: processes that share the reading, each of which must call this; all of them get the same answer.

    Raises:
        CheckpointError: when there are checkpoints, but none of them is whole: about the newest.
    """
    errors: list[CheckpointError] = []
    names = [path.name for path in reversed(list_checkpoints(folder))]
    if ranks is not None:
        names = json.loads(ranks.gather(json.dumps(names))[0])
    for name in names:
        path, error = folder / name, None
        try:
            check_whole(path, verified=verified, part=(ranks.rank, ranks.count) if ranks else (0, 1))
        except CheckpointError as found:
            error = found
        if ranks is not None:
            messages = filter(None, ranks.gather(str(error or "")))
            error = next(map(CheckpointError, messages), None)
        if error is None:
            return path, errors
        errors.append(error)
    if errors:
        raise errors[0]
    return None, []


def check_weights(path: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Raises CheckpointError naming the file when a checkpoint's weights are missing or damaged; `part` as `verify`."""
    files = model_files(path)
    if not files:
        raise CheckpointError(f"{path} holds no model.safetensors")
    for file in _share(files, part):
        _check_header(file)


def _share(things: list[T], part: tuple[int, int]) -> list[T]:
    rank, count = part
    return things[rank::count]


def _check_header(file: Path) -> None:
    try:
        # opened by Python first: safetensors says of a file that may not be read that it does not exist
        with file.open("rb"), safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def tokenizer_files(run: Path) -> dict[str, Path]:
    """The files of a run's tokenizer by their names from the run's folder; none for a folder that is not a run's."""
    files = [path for path in (run / _TOKENIZER).rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path for path in files}


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, course_of_sparsity: list[float]
) -> dict[str, Tensor]:
    """What a checkpoint has beside the model: random state, moments (sharded as the model is), and S of each step."""
    tensors = {_RNG_CPU: torch.get_rng_state(), _COURSE: torch.tensor(course_of_sparsity)}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[_RNG_CUDA] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach()
    return tensors
