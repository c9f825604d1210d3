"""A run's folder: where everything of a run lies, and how to load a trained model from it.

RUN/config.yaml            every option of the run
RUN/tokenizer/             loads with transformers.AutoTokenizer
RUN/metrics.jsonl          one record a step; RUN/tensorboard/ holds the same
RUN/checkpoints/step-N/    loads with RemoeForCausalLM.from_pretrained
RUN/summary.json           final figures
RUN/sample.txt             text written by the trained model
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from remoe.errors import CheckpointError, ConfigError
from remoe.lab.files import atomic_write, check_new_folder
from remoe.lab.training.checkpoint import check_weights, list_checkpoints
from remoe.lab.training.config import TrainConfig, config_from_yaml, to_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remoe.models.modeling_remoe import RemoeForCausalLM

RUNS = Path("runs")


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"
        self.sample = self.path / "sample.txt"

    def create(self, config: TrainConfig, tokenizer_path: Path) -> None:
        """Starts a run's folder.

        Raises:
            ConfigError: as `check_new`.
            CheckpointError: when it cannot be written.
        """
        self.check_new()
        # Renamed when it is whole: a kill leaves no half of a run.
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(tokenizer_path, partial / self.tokenizer.name)
            (partial / self.config.name).write_bytes(_options(config))
            os.rename(partial, self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot write the run's folder {self.path}: {reason}") from error

    def check_new(self) -> None:
        """Raises ConfigError when a new run cannot have this folder."""
        if self.config.exists():
            raise ConfigError(f"{self.path} already holds a run: add --resume to continue it, or choose another --out")
        check_new_folder(self.path)

    def write_config(self, config: TrainConfig) -> None:
        """Replaces the run's options."""
        atomic_write(self.config, _options(config))

    @property
    def written(self) -> float:
        """When training wrote to it last, seconds since the epoch."""
        places = (self.config, self.metrics, self.checkpoints, self.summary)
        return max(place.stat().st_mtime for place in places if place.exists())

    def load_summary(self) -> dict:
        """The final figures; nothing for a run that is not finished."""
        try:
            return json.loads(self.summary.read_text())
        except (FileNotFoundError, ValueError):  # or half a file: killed while it was written
            return {}

    def load_config(self) -> TrainConfig:
        """The run's options.

        Raises:
            CheckpointError: when the folder is no run.
        """
        if not self.config.exists():
            raise CheckpointError(f"{self.path} is not a run: it has no config.yaml")
        return config_from_yaml(self.config)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None


def _options(config: TrainConfig) -> bytes:
    return to_yaml(config.to_dict()).encode()


def first_run_path(config: TrainConfig) -> Path:
    """runs/PRESET-ROUTER-seedN."""
    return RUNS / f"{config.preset}-{config.router}-seed{config.seed}"


def new_run_path(config: TrainConfig) -> Path:
    """The same, with a number behind it when that is taken."""
    first = path = first_run_path(config)
    number = 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


def newest_run() -> Path:
    """The run under runs/ that was written to last.

    Raises:
        CheckpointError: when there is none.
    """
    found = [path.parent for path in RUNS.glob("*/config.yaml")]
    if not found:
        raise CheckpointError(f"nothing to resume: no run under {RUNS}/; name one with --out")
    return max(found, key=lambda path: RunFolder(path).written)


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run that has this checkpoint; None for a folder that is none."""
    checkpoint = Path(os.path.abspath(checkpoint))
    run = RunFolder(checkpoint.parent.parent)
    return run if checkpoint.parent.name == run.checkpoints.name and run.config.exists() else None


def load_run(path: str | Path) -> tuple["RemoeForCausalLM", "PreTrainedTokenizerBase", Path]:
    """Model, tokenizer and checkpoint of a run's folder, or of one of its checkpoints.

    Raises:
        CheckpointError: when there is no checkpoint or it cannot be read.
    """
    from remoe.lab.data import load_tokenizer
    from remoe.models.modeling_remoe import RemoeForCausalLM

    path = Path(path)
    run = run_of(path) or RunFolder(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist or is not a folder")
    checkpoint = path if run.path != path else run.last_checkpoint()
    if checkpoint is None:
        raise CheckpointError(f"{path} has no checkpoint yet" if run.config.exists() else f"{path} is not a run")
    check_weights(checkpoint)
    if not (checkpoint / "config.json").is_file() or not run.tokenizer.is_dir():
        raise CheckpointError(f"{run.path} is incomplete: {checkpoint / 'config.json'} or {run.tokenizer} is missing")
    try:
        model = RemoeForCausalLM.from_pretrained(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {checkpoint}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), load_tokenizer(run.tokenizer), checkpoint


def load_model(path: str | Path, *, hub: bool = False) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", Path]:
    """Model, tokenizer and where they lie: of a run or checkpoint as `load_run`, or of any transformers folder.

    Args:
        path: the folder.
        hub: whether what is no folder is a name on the Hugging Face hub.

    Raises:
        CheckpointError: when there is no model, or it cannot be loaded.
        DataError: when its tokenizer cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from remoe.convert.relufy.model import MODEL_TYPE, load_relufied
    from remoe.lab.data import load_tokenizer
    from remoe.models.modeling_remoe import RemoeForCausalLM

    name, path = str(path), Path(path)
    config = path / "config.json"
    if run_of(path) or not (config.is_file() or (hub and not path.exists())):
        return load_run(path)
    loaders = {RemoeForCausalLM.config_class.model_type: RemoeForCausalLM.from_pretrained, MODEL_TYPE: load_relufied}
    try:
        kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        model = loaders.get(kind, partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=False))(name)
    except Exception as error:  # the libraries that transformers reads a folder with have no common base of errors
        raise CheckpointError(f"cannot load {name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), load_tokenizer(name), path
