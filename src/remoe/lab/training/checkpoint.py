"""Checkpoints: written beside, then renamed, so that a crash at any moment leaves the last good one whole.

A checkpoint is a folder `step-00000200` that transformers can load (`config.json`, `model.safetensors`), with
`training.safetensors` (optimiser moments, random state) and `training.json` (step, what it belongs to). No pickle.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remoe.errors import CheckpointError

_PREFIX = "step-"
_PARTIAL = ".partial-"
_COST = ("seconds", "peak_memory_bytes")  # 0 in checkpoints of before they were kept
_RNG_CPU, _RNG_CUDA, _COURSE = "rng.cpu", "rng.cuda", "course_of_sparsity"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit())


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[len(_PREFIX) :])


def saved_step(path: Path) -> int:
    """The step that a checkpoint was saved at, whatever its name.

    Raises:
        CheckpointError: when it does not say.
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
        info: small JSON values: what the checkpoint belongs to.
        course_of_sparsity: S of each step so far.

    Raises:
        CheckpointError: when it cannot be written, a full disk for one; the earlier checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tensors = _training_tensors(model, optimizer) | {_COURSE: torch.tensor(course_of_sparsity)}
        save_file(tensors, partial / "training.safetensors")
        (partial / "training.json").write_text(json.dumps({"step": step, **info}, indent=2))
        for path in partial.iterdir():
            _sync(path)
        os.rename(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write checkpoint {final}: {error}; {last}") from error
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
    """Applies the retention rule: the newest `keep`, and those whose step is a multiple of `keep_every`, stay."""
    for path in folder.glob(f"{_PARTIAL}*"):
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
    """Deletes a folder in such a way that a crash cannot leave half of it under its name."""
    if path.exists():
        doomed = path.parent / f"{_PARTIAL}doomed-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot sync a folder; the rename is atomic there all the same.
        with contextlib.suppress(OSError if path.is_dir() else ()):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
