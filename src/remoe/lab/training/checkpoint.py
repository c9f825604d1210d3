"""Checkpoints. A crash at any moment, even during a write, leaves the previous checkpoint whole.

A checkpoint is a folder `step-00000200` that transformers can load (`config.json`, `model.safetensors`), with
`training.safetensors` (optimiser moments, random state) and `training.json` (step, fingerprint of the data). No pickle.
`checksums.json` has the sha256 of each of these files, and of the run's tokenizer: together they are one checkpoint.
"""

import hashlib
import json
import shutil
from operator import index
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remoe.errors import CheckpointError, DataError
from remoe.lab.files import TEMPORARY, remove_whole, replacing
from remoe.models.sharding import is_sharded, sharded_like, unsharded_twin, whole

_PREFIX = "step-"
_LEFT_OVERS = (f".*{TEMPORARY}", ".partial-*")  # of a process that was killed: today's names, and those of 0.1.0
_COST = ("seconds", "peak_memory_bytes")  # 0 in old checkpoints, which do not have them
CHECKSUMS = "checksums.json"
_TOKENIZER = "tokenizer"  # a folder of the run
_HASH_BYTES = 1 << 24
_RNG_CPU, _RNG_CUDA, _COURSE = "rng.cpu", "rng.cuda", "course_of_sparsity"
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
    writes: bool = True,
    merged: dict[str, Tensor] | None = None,
    trained: dict[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint atomically and durably; of a model that is sharded, the same files as of a whole one.

    Args:
        folder: the run's `checkpoints`.
        step: optimiser steps done.
        model: with `save_pretrained`.
        optimizer: over `model`'s parameters.
        info: small JSON values, such as the fingerprint of the data.
        course_of_sparsity: S of each step so far.
        writes: whether this process writes. Every rank with a shard of the model must call this, and one writes.
        merged: of a model with adapters, the weights to write in place of the model's own.
        trained: of such a model, the tensors that training changes, which are kept beside the optimiser's state.

    Raises:
        CheckpointError: when it cannot be written, for example because the disk is full; earlier checkpoints are
            untouched.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    tensors = _training_tensors(model, optimizer, writes) | {_COURSE: torch.tensor(course_of_sparsity)}
    tensors |= {f"{_TRAINED}{name}": tensor for name, tensor in (trained or {}).items()}
    weights = _gathered(model, writes) if merged is None else merged
    if not writes:
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_whole(final)  # damaged, otherwise the run would have been resumed from it
        with replacing(final) as partial:
            if weights is None:
                model.save_pretrained(partial)
            else:
                unsharded_twin(model).save_pretrained(partial, state_dict=weights)
            save_file(tensors, partial / "training.safetensors")
            (partial / "training.json").write_text(json.dumps({"step": step, **info}, indent=2))
            parts = {path.name: path for path in partial.iterdir()} | _tokenizer_files(folder.parent)
            checksums = {name: _sha256(path) for name, path in sorted(parts.items())}
            (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
    except (OSError, DataError, SafetensorError) as error:
        kept = list_checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"cannot write checkpoint {final}: {reason}; {last}") from error
    return final


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
        state = load_file(path / "training.safetensors")
        own = model.state_dict()
        if trained := {
            name.removeprefix(_TRAINED): value for name, value in state.items() if name.startswith(_TRAINED)
        }:
            weights = own | trained  # the others are frozen, and as the model has them
        elif weights is None:
            files = sorted(path.glob("model*.safetensors"))
            weights = {name: value for file in files for name, value in load_file(file).items()}
        weights = {name: sharded_like(value, own[name]) if name in own else value for name, value in weights.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if wrong := [*(set(missing) - tied), *unexpected]:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {', '.join(wrong[:3])}")
        _restore_training(state, model, optimizer)
        info = {"step": index(info["step"]), "data": info["data"]} | {name: info.get(name, 0) for name in _COST}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"cannot load checkpoint {path}: {message}") from error
    return info, state[_COURSE].tolist()


def _restore_training(state: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.set_rng_state(state[_RNG_CPU])
    device = next(model.parameters()).device
    if device.type == "cuda" and _RNG_CUDA in state:
        torch.cuda.set_rng_state(state[_RNG_CUDA], device)
    for name, parameter in model.named_parameters():
        for key in _OPTIMISER:
            if f"{name}.{key}" not in state:  # it had no gradient yet, or another optimiser
                continue
            # Fused AdamW keeps its step counter beside the parameter.
            value = state[f"{name}.{key}"]
            value = value if key == "step" else sharded_like(value, parameter)
            optimizer.state[parameter][key] = value.to(parameter.device)


def clean(folder: Path, newest: int, keep: int, keep_every: int = 0, kept: int | None = None) -> None:
    """Deletes left-overs, and checkpoints up to step `newest` but the last `keep`, those every `keep_every` steps and
    that of step `kept`.

    Folders of later steps stay: they are damaged, or a user's.
    """
    for pattern in _LEFT_OVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in list_checkpoints(folder) if checkpoint_step(path) <= newest][:-keep]:
        step = checkpoint_step(path)
        if step != kept and not (keep_every and step % keep_every == 0):
            remove_whole(path)


def verify(path: Path) -> None:
    """Compares every file of a checkpoint, and the tokenizer of its run, with the checksums that were saved with it.

    A checkpoint of version 0.1.0 has no checksums; only the headers of its weights are read.

    Raises:
        CheckpointError: naming a file that is missing, damaged, or of another checkpoint.
    """
    check_weights(path)
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
    for name, expected in checksums.items():
        inside = name.startswith(f"{_TOKENIZER}/")
        if inside and not in_run:
            continue
        file = (path.parent.parent if inside else path) / name
        try:
            found = _sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}), but belongs to {path}") from error
        if found != expected:
            raise CheckpointError(f"{file} is damaged, or of another checkpoint than {path}: its checksum differs")
    if foreign := sorted({file.name for file in path.glob("model*.safetensors")} - checksums.keys()):
        raise CheckpointError(f"{path / foreign[0]} does not belong to this checkpoint")


def check_whole(path: Path, *, verified: bool) -> None:
    """Raises CheckpointError if a run cannot be resumed from a checkpoint.

    Args:
        path: the checkpoint.
        verified: also `verify` it, which reads all of it; otherwise only whether all files and headers are there.
    """
    (verify if verified else check_weights)(path)
    saved_step(path)
    for name in ("config.json", "training.safetensors"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
    _check_header(path / "training.safetensors")


def newest_whole(folder: Path, *, verified: bool) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that `check_whole` accepts, and what is wrong with each newer one; None without any.

    Raises:
        CheckpointError: when there are checkpoints, but none of them is whole: about the newest.
    """
    errors: list[CheckpointError] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            check_whole(path, verified=verified)
        except CheckpointError as error:
            errors.append(error)
        else:
            return path, errors
    if errors:
        raise errors[0]
    return None, []


def check_weights(path: Path) -> None:
    """Raises CheckpointError naming the file when a checkpoint's weights are missing or damaged."""
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no model.safetensors")
    for file in files:
        _check_header(file)


def _check_header(file: Path) -> None:
    try:
        # opened by Python first: safetensors says of a file that may not be read that it does not exist
        with file.open("rb"), safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _tokenizer_files(run: Path) -> dict[str, Path]:
    """The files of a run's tokenizer by their names from the run's folder; none for a folder that is not a run's."""
    files = [path for path in (run / _TOKENIZER).rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path for path in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _gathered(model: nn.Module, kept: bool) -> dict[str, Tensor] | None:
    """The whole weights of a sharded model on the CPU, where they are `kept`; None for a model that is whole."""
    if not is_sharded(model):
        return None
    tied, weights = set(getattr(model, "all_tied_weights_keys", None) or ()), {}
    for name, tensor in model.state_dict().items():
        value = whole(tensor)
        if kept and name not in tied:
            weights[name] = value.cpu()
    return weights


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, kept: bool = True) -> dict[str, Tensor]:
    """Random state and optimiser state, gathered from all ranks and on the CPU where the model is sharded."""
    tensors = {_RNG_CPU: torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[_RNG_CUDA] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            value, sharded = whole(value.detach()), isinstance(value, DTensor)
            if kept:
                tensors[f"{name}.{key}"] = value.cpu() if sharded else value
    return tensors
