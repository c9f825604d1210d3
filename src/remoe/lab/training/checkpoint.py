"""Checkpoints. A crash at any moment, even during a write, leaves the previous checkpoint whole.

A checkpoint is a folder `step-00000200` that transformers can load (`config.json`, `model.safetensors`), with
`training.safetensors` (optimiser moments, random state) and `training.json` (step, fingerprint of the data). No pickle.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remoe.errors import CheckpointError, DataError
from remoe.lab.files import TEMPORARY, replacing, temporary_name

_PREFIX = "step-"
_LEFT_OVERS = (f".*{TEMPORARY}", ".partial-*")  # of a process that was killed: today's names, and those of 0.1.0
_COST = ("seconds", "peak_memory_bytes")  # 0 in old checkpoints, which do not have them
_RNG_CPU, _RNG_CUDA, _COURSE = "rng.cpu", "rng.cuda", "course_of_sparsity"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
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
        return int(json.loads((path / "training.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'training.json'} is missing or damaged ({error})") from error


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: dict[str, object],
    course_of_sparsity: list[float],
) -> Path:
    """Writes a checkpoint atomically and durably.

    Args:
        folder: the run's `checkpoints`.
        step: optimiser steps done.
        model: with `save_pretrained`.
        optimizer: over `model`'s parameters.
        info: small JSON values, such as the fingerprint of the data.
        course_of_sparsity: S of each step so far.

    Raises:
        CheckpointError: when it cannot be written, for example because the disk is full; earlier checkpoints are
            untouched.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(final) as partial:
            model.save_pretrained(partial)
            tensors = _training_tensors(model, optimizer) | {_COURSE: torch.tensor(course_of_sparsity)}
            save_file(tensors, partial / "training.safetensors")
            (partial / "training.json").write_text(json.dumps({"step": step, **info}, indent=2))
    except (OSError, DataError, SafetensorError) as error:
        kept = list_checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"cannot write checkpoint {final}: {reason}; {last}") from error
    return final


def load_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, object], list[float]]:
    """Restores weights, buffers, optimiser and random state in place.

    Returns:
        `info` as given to `save_checkpoint`, with "step"; and S of each step so far.

    Raises:
        CheckpointError: when a file is missing or damaged, or tensors do not fit the model.
    """
    try:
        info = json.loads((path / "training.json").read_text())
        weights = {
            name: value for file in sorted(path.glob("model*.safetensors")) for name, value in load_file(file).items()
        }
        state = load_file(path / "training.safetensors")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if wrong := [*(set(missing) - tied), *unexpected]:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {', '.join(wrong[:3])}")
        _restore_training(state, model, optimizer)
        info = {"step": info["step"], "data": info["data"]} | {name: info.get(name, 0) for name in _COST}
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
        if f"{name}.step" not in state:  # it had no gradient yet
            continue
        for key in ("step", "exp_avg", "exp_avg_sq"):
            # Fused AdamW keeps its step counter beside the parameter.
            optimizer.state[parameter][key] = state[f"{name}.{key}"].to(parameter.device)


def clean(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Deletes left-overs, and every checkpoint but the newest `keep` and those at multiples of `keep_every` steps."""
    for pattern in _LEFT_OVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(folder)[:-keep]:
        if not (keep_every and checkpoint_step(path) % keep_every == 0):
            _remove(path)


def check_weights(path: Path) -> None:
    """Raises CheckpointError naming the file when a checkpoint's weights are missing or damaged."""
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no model.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {_RNG_CPU: torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[_RNG_CUDA] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach()
    return tensors


def _remove(path: Path) -> None:
    """Deletes a checkpoint; a crash on the way cannot leave half of it under its name."""
    doomed = path.with_name(temporary_name(path.name))
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
