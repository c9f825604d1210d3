"""A run with the schedule 'wsd' made longer or shorter, in its folder or as a branch in a new one."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from remoe.errors import CheckpointError, ConfigError
from remoe.lab.files import new_folder
from remoe.lab.training.checkpoint import saved_step, verify
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.optimizer import stable_end, warmup_steps


def prolong(saved: TrainConfig, config: TrainConfig, run: Path, checkpoint: Path | None) -> TrainConfig:
    """The options of a run with another number of steps; `config` gets the warm-up that the run had.

    Args:
        saved: the options that the run was started with.
        config: those with which it is resumed, `steps` among them.
        run: its folder.
        checkpoint: from which it is resumed; None for a run that has none yet.

    Raises:
        CheckpointError: where the schedule does not allow it: it must be 'wsd', and neither the old nor the new decay
            may begin before the checkpoint.
    """
    if saved.optim.schedule != "wsd":
        raise CheckpointError(
            f"cannot resume {run} with --steps {config.steps}: its learning rate falls along a cosine of "
            f"{saved.steps} steps; only a run that was started with --optim.schedule wsd can be made longer"
        )
    step, place = (0, run) if checkpoint is None else (saved_step(checkpoint), checkpoint)
    if step > (end := stable_end(saved.steps, saved.optim)):
        earlier = shlex.quote(str(run / "checkpoints" / f"step-{end:08d}"))
        raise CheckpointError(
            f"cannot resume {place} with --steps {config.steps}: its learning rate has fallen since step {end}; branch "
            f"off there: remoe train --resume --from {earlier} --out NEW --steps {config.steps}"
        )
    if step > (begin := stable_end(config.steps, saved.optim)):
        raise CheckpointError(
            f"cannot resume {place} with --steps {config.steps}: the learning rate would have to fall from step "
            f"{begin} on"
        )
    config.optim = replace(config.optim, warmup_steps=warmup_steps(saved.steps, saved.optim))
    return replace(saved, steps=config.steps, optim=replace(saved.optim, warmup_steps=config.optim.warmup_steps))


def branching_run(checkpoint: Path) -> RunFolder:
    """The run of a checkpoint that another run is to go on from; raises CheckpointError when it is of none."""
    if (run := run_of(checkpoint)) is None:
        raise CheckpointError(
            f"--resume --from {checkpoint}: not a checkpoint of a run, such as RUN/checkpoints/step-N"
        )
    return run


def branch(checkpoint: Path, saved: TrainConfig, config: TrainConfig) -> RunFolder:
    """A new run in `config.out` that goes on from a checkpoint of another run, with a copy of it.

    Args:
        checkpoint: of a run.
        saved: the options of that run.
        config: those of the new one.

    Raises:
        CheckpointError: when the checkpoint is damaged, or as `prolong`.
        ConfigError: when there is no `config.out`, it holds something already, or there is a mesh.
    """
    if config.out is None:
        raise ConfigError("--resume --from CHECKPOINT makes a new run: name its folder with --out")
    if config.mesh is not None:
        raise ConfigError("--resume --from CHECKPOINT works on one process; its run can be resumed with --mesh later")
    run, new = branching_run(checkpoint), RunFolder(config.out)
    new.check_new()
    verify(checkpoint)
    if config.steps != saved.steps:
        prolong(saved, replace(config), run.path, checkpoint)
    with new_folder(new.path) as folder:
        for path in (run.config, run.metrics, run.start):
            if path.exists():
                shutil.copy(path, folder / path.name)
        shutil.copytree(run.tokenizer, folder / run.tokenizer.name)
        shutil.copytree(checkpoint, folder / run.checkpoints.name / checkpoint.name)
    new.write_config(replace(saved, out=config.out))
    return new
