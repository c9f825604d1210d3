"""The folder of a run, and where runs are kept. `load.py` loads a trained model from one.

RUN/config.yaml            every option of the run
RUN/tokenizer/             loads with transformers.AutoTokenizer
RUN/start.json             with --from: the model that the run started from, and its loss
RUN/metrics.jsonl          one record per step; RUN/tensorboard/ holds the same numbers
RUN/checkpoints/step-N/    of a run on one process, loads with RemoeForCausalLM.from_pretrained; see `checkpoint.py`
RUN/summary.json           final figures
RUN/sample.txt             text written by the trained model
RUN/ranks.log              of a run on several processes: why each of them ended, unless it finished
RUN/launch.txt             of a run under `torchrun --max-restarts`: which torchrun began it
"""

import json
import logging
import os
import shutil
from pathlib import Path

from remoe.errors import CheckpointError, ConfigError
from remoe.lab.files import atomic_write, check_new_folder, new_folder
from remoe.lab.training.checkpoint import newest_whole
from remoe.lab.training.config import TrainConfig, config_from_yaml
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.yaml_files import to_yaml

logger = logging.getLogger(__name__)

RUNS = Path("runs")
# Numbers that every summary has.
_FIGURES = (
    "steps", "total_parameters", "active_parameters", "tokens", "flops", "peak_memory_bytes", "seconds",
    "validation_loss", "target_sparsity", "final_sparsity",
)  # fmt: skip


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.start = self.path / "start.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"
        self.sample = self.path / "sample.txt"
        self.launch = self.path / "launch.txt"

    def create(self, config: TrainConfig, tokenizer_path: Path, launch: str | None = None) -> None:
        """Makes the folder of a new run, whole or not at all.

        Args:
            config: options of the run.
            tokenizer_path: folder of the tokenizer, which is copied.
            launch: name of the torchrun that started this process, if it restarts processes; see `elastic.py`.

        Raises:
            ConfigError: as `check_new`.
            DataError: when the folder cannot be written.
        """
        self.check_new()
        with new_folder(self.path) as folder:
            shutil.copytree(tokenizer_path, folder / self.tokenizer.name)
            (folder / self.config.name).write_bytes(_options(config))
            if launch is not None:
                (folder / self.launch.name).write_text(launch)

    def check_new(self) -> None:
        """Raises ConfigError when a new run cannot be written here."""
        if self.config.exists():
            raise ConfigError(f"{self.path} already holds a run: add --resume to continue it, or choose another --out")
        check_new_folder(self.path)

    def write_config(self, config: TrainConfig) -> None:
        """Replaces the run's options; raises DataError when they cannot be written."""
        atomic_write(self.config, _options(config))

    @property
    def written(self) -> float:
        """The time of the last write by training, in seconds since the epoch."""
        places = (self.config, self.metrics, self.checkpoints, self.summary)
        return max(place.stat().st_mtime for place in places if place.exists())

    def load_summary(self) -> dict:
        """The final figures; an empty dict for a run that is not finished.

        A file that is damaged or lacks a figure counts as none, with a warning: resuming the run writes it again.
        """
        try:
            found = json.loads(self.summary.read_text())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):  # 0.1.0 could leave half a file when it was killed
            found = None
        if _is_summary(found):
            return found
        logger.warning("%s is damaged: the run is taken as not finished; --resume writes it again", self.summary)
        return {}

    def load_config(self) -> TrainConfig:
        """The run's options.

        Raises:
            CheckpointError: when the folder is not a run.
        """
        if not self.config.exists():
            raise CheckpointError(f"{self.path} is not a run: it has no config.yaml")
        return config_from_yaml(self.config)

    def last_checkpoint(self, *, verified: bool = False, ranks: Ranks | None = None) -> Path | None:
        """The newest checkpoint with all its files, or None for a run without any.

        Args:
            verified: the newest whose checksums are right too, for which it is read; with a warning about each newer
                one, which is damaged.
            ranks: processes that share the reading and agree on the answer; each of them must call this.

        Raises:
            CheckpointError: when every checkpoint is damaged.
        """
        found, errors = newest_whole(self.checkpoints, verified=verified, ranks=ranks)
        for error in errors if verified else ():
            logger.warning("%s: this checkpoint is left out; the newest whole one is %s", error, found)
        return found


def _options(config: TrainConfig) -> bytes:
    return to_yaml(config.to_dict()).encode()


def first_run_path(config: TrainConfig) -> Path:
    """runs/PRESET-ROUTER-seedN, or runs/FOLDER-tuned-seedN for one that starts from a folder."""
    if config.from_ is not None:
        run = run_of(Path(config.from_))
        return RUNS / f"{(run.path if run else Path(config.from_)).name}-tuned-seed{config.seed}"
    return RUNS / f"{config.preset}-{config.router}-seed{config.seed}"


def new_run_path(config: TrainConfig) -> Path:
    """As `first_run_path`, with a number appended when that folder exists."""
    first = path = first_run_path(config)
    number = 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


def newest_run() -> Path:
    """The most recently written run under runs/.

    Raises:
        CheckpointError: when there is no run.
    """
    found = [path.parent for path in RUNS.glob("*/config.yaml")]
    if not found:
        raise CheckpointError(f"nothing to resume: no run under {RUNS}/; name one with --out")
    return max(found, key=lambda path: RunFolder(path).written)


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint belongs to; None for a folder that is not a run's checkpoint."""
    checkpoint = Path(os.path.abspath(checkpoint))
    run = RunFolder(checkpoint.parent.parent)
    return run if checkpoint.parent.name == run.checkpoints.name and run.config.exists() else None


def _is_summary(found: object) -> bool:
    try:
        rows = found["validation"]
        numbers = (
            [found[name] for name in _FIGURES] + [row["loss"] for row in rows.values()] + [rows["all"]["sparsity"]]
        )
    except (TypeError, KeyError, AttributeError):
        return False
    return all(isinstance(number, int | float) for number in numbers)
