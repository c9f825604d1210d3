"""The pool: a folder of runs that experiments share.

POOL/LABEL-HASH/        a run's folder, as `remoe train` writes it; finished when it has a summary.json
POOL/LABEL-HASH.yaml    the options that it was started with
POOL/LABEL-HASH.log     what it printed
POOL/.HASH.lock         locked while it runs
POOL/LABEL-HASH.json    the record of a finished run; in another folder where one is named

A run that has a record is finished, with or without a folder.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from remoe.errors import ConfigError
from remoe.lab.compare.experiment import Run, key_of
from remoe.lab.compare.record import RunRecord, ZeroShot, course_of, options_of, record_of
from remoe.lab.data import Dataset
from remoe.lab.machine import pick_device
from remoe.lab.training.checkpoint import checkpoint_step
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.metrics import fill_steps, iterate_metrics

HASH_LENGTH = 8
LIST_SECONDS = 1.0
State = Literal["finished", "unfinished", "not started"]


@dataclass(frozen=True)
class Tasks:
    """Zero-shot tasks from `zeroshot.load_tasks`, and how many rows of each; None for all."""

    loaded: dict[str, Any]
    limit: int | None


class Pool:
    """Where runs on one dataset lie.

    Args:
        path: the pool's folder.
        data: fingerprint of the data.
        records: folder of the finished runs' records; the pool's own by default.
        bfloat16: whether `--dtype auto` means bfloat16 on the runs' device: such runs are others than those in float32.
        tasks: zero-shot tasks that records must have, where the run's checkpoints are still there.
    """

    def __init__(
        self,
        path: Path,
        data: str,
        records: Path | None = None,
        *,
        bfloat16: bool = False,
        tasks: Tasks | None = None,
    ) -> None:
        self.path, self.records, self._data, self._bfloat16 = path, records or path, data, bfloat16
        self._tasks = tasks
        self._folders: dict[str, str] = {}  # names by hash: what is there keeps its name
        self._files: dict[str, str] = {}  # those of the records, which may come from elsewhere
        self._records: dict[str, RunRecord] = {}  # by the run's key
        self._recordless: dict[str, RunRecord] = {}  # what the folder of a finished run gives, until it has a record
        self._listed = -math.inf

    def name(self, run: Run) -> str:
        """LABEL-HASH; an experiment that calls the same run by another label finds the folder of the first."""
        return self._name(run, self._folders, self._files)

    def _name(self, run: Run, *known: dict[str, str]) -> str:
        key = self._hash(run)
        if not any(key in names for names in known):
            self._list()
        return next((names[key] for names in known if key in names), f"{run.label}-{key}")

    def _hash(self, run: Run) -> str:
        # A run is the same whether its type is said or is its device's own.
        dtype, key = run.config.dtype, run.key
        if dtype != "auto":
            key = key_of(replace(run.config, dtype="auto"))
        kind = " bfloat16" if dtype == "bfloat16" or (dtype == "auto" and self._bfloat16) else ""
        return hashlib.sha256(f"{key} {self._data}{kind}".encode()).hexdigest()[:HASH_LENGTH]

    def _list(self) -> None:
        """Finds the names that runs have; once a second, because a moving table asks for all of them all the time."""
        if time.monotonic() - self._listed < LIST_SECONDS:
            return
        folders = [path.name for path in self.path.glob("[!.]*-*") if path.is_dir()]
        files = [path.stem for path in self.records.glob("[!.]*-*.json")]
        for names, found in ((self._folders, folders), (self._files, files)):
            for name in sorted(found):
                names.setdefault(name[-HASH_LENGTH:], name)
        self._listed = time.monotonic()

    def folder(self, run: Run) -> RunFolder:
        """The run's folder, which need not exist."""
        return RunFolder(self.path / self.name(run))

    def options_file(self, run: Run) -> Path:
        """Where the run's options stand."""
        return self.path / f"{self.name(run)}.yaml"

    def summary(self, run: Run) -> dict | None:
        """The figures of a finished run; None for any other.

        Raises:
            ConfigError: when the run was trained with other defaults than today's.
        """
        found = self._found(run)
        return None if found is None else found.summary

    def sparsities(self, run: Run) -> list[float]:
        """S of each training step of a finished run; between two records (`--log-every`) that of the later one."""
        course = self._found(run).course
        return fill_steps(course["step"], course["sparsity"])

    def layer_sparsities(self, run: Run) -> list[list[float]] | None:
        """S of each layer at each training step of a finished run; None for a model without pairs."""
        course = self._found(run).course
        if "sparsity_per_layer" not in course:
            return None
        return fill_steps(course["step"], course["sparsity_per_layer"])

    def step_minutes(self, run: Run) -> list[float] | None:
        """Duration of each training step of a finished run; None where a record has been made without."""
        found = self._found(run)
        if "tokens_per_second" not in found.course:
            return None
        tokens = found.summary["tokens"] / found.summary["steps"]
        return [tokens / speed / 60 for speed in fill_steps(found.course["step"], found.course["tokens_per_second"])]

    def zero_shot(self, run: Run) -> ZeroShot | None:
        """Zero-shot accuracies of a finished run, where its record has them."""
        return self._found(run).zero_shot

    def _found(self, run: Run) -> RunRecord | None:
        """A finished run's record, or what its folder gives of one; None for any other run."""
        if run.key in self._records:
            return self._records[run.key]
        folder, path = self.folder(run), self.record_file(run)
        if recorded := path.exists():
            found = RunRecord.load(path)
            if found.data not in ("", self._data):
                raise ConfigError(f"{path} is the record of a run on other data: move it away")
        elif run.key in self._recordless:
            return self._recordless[run.key]
        else:
            try:
                summary = json.loads(folder.summary.read_text())
            except (FileNotFoundError, ValueError):  # half a file: killed while it was written
                return None
            course = course_of(iterate_metrics(folder.metrics))
            found = RunRecord(options_of(folder.load_config()), summary, course, None)
        # The hash says which type it had; an unfinished run would go on by the word, on whatever device.
        options = {name: value for name, value in found.options.items() if name != "dtype"}
        _check_same(run, options, path if recorded else folder.path)
        known = self._records if recorded else self._recordless  # some process will make a record
        known[run.key] = found
        return found

    def record(self, run: Run, dataset: Dataset, device: str) -> RunRecord:
        """The record of a finished run; made where that is missing.

        Args:
            run: finished.
            dataset: the pool's, for the routing of validation tokens.
            device: for the forward passes.
        """
        if self.record_file(run).exists():
            return self._found(run)
        return self._save(run, record_of(self.folder(run), dataset, self._data, device))

    def add_tasks(self, run: Run, device: str, stop: Callable[[], bool] = lambda: False) -> None:
        """Adds to a run's record the zero-shot tasks that are missing in it, and saves it after each of them.

        On as many rows as it has, if those are no fewer than asked for; else they take the place of what it has.

        Args:
            run: with a record.
            device: for the forward passes.
            stop: asked before each task.
        """
        if not (missing := self._missing_tasks(run)) or stop():
            return
        from remoe.lab.evaluation.zeroshot import evaluate_model  # needs an extra

        record = self._found(run)
        known = record.zero_shot
        if known is None or _rows(known.limit) < _rows(self._tasks.limit):
            known = ZeroShot(self._tasks.limit, {})

        def keep(name: str, result: Any) -> bool:
            nonlocal known, record
            known = replace(known, tasks=known.tasks | {name: asdict(result)})
            record = self._save(run, replace(record, zero_shot=known))
            return not stop()

        tasks = {name: self._tasks.loaded[name] for name in missing}
        place = pick_device(device)
        evaluate_model(self.folder(run).path, tasks, limit=known.limit, device=place, after=keep)

    def _save(self, run: Run, record: RunRecord) -> RunRecord:
        self.records.mkdir(parents=True, exist_ok=True)
        record.save(self.record_file(run))
        self._records[run.key] = record
        return record

    def _missing_tasks(self, run: Run) -> list[str]:
        """Tasks that are asked for, that the record does not have with as many rows, and that could be evaluated."""
        if self._tasks is None:
            return []
        last = self.folder(run).last_checkpoint()
        if last is None or checkpoint_step(last) != run.steps:  # an unfinished folder of a run with a record
            return []
        known = self.zero_shot(run)
        enough = {} if known is None or _rows(known.limit) < _rows(self._tasks.limit) else known.tasks
        return [task for task in self._tasks.loaded if task not in enough]

    def recorded(self, run: Run) -> bool:
        """Whether the run is finished and has its record, and nothing is left to do."""
        return self.summary(run) is not None and self.record_file(run).exists() and not self._missing_tasks(run)

    def state(self, run: Run) -> State:
        """How far a run is.

        Raises:
            ConfigError: as `summary`, for an unfinished run too.
        """
        if self.summary(run) is not None:
            return "finished"
        if not (folder := self.folder(run)).config.exists():
            return "not started"
        _check_same(run, options_of(folder.load_config()), folder.path)
        return "unfinished"

    def record_file(self, run: Run) -> Path:
        """Where the run's record stands, once it is finished."""
        return self.records / f"{self._name(run, self._files, self._folders)}.json"

    def log_file(self, run: Run) -> Path:
        """Where the run's output goes."""
        return self.path / f"{self.name(run)}.log"

    @contextmanager
    def claimed(self, run: Run) -> Iterator[IO[bytes] | None]:
        """A lock on the run against other processes: a file that is locked; None when another has it.

        A child that inherits the file holds the lock too: a run whose parent was killed stays locked while it trains.
        The lock has the run's hash alone in its name, since two experiments may call one run by two labels.
        """
        with (self.path / f".{self._hash(run)}.lock").open("ab") as file:
            locked = _lock(file)
            if locked:  # whoever had it before may have given the run a name, and its record more
                self._listed = -math.inf
                self._records.pop(run.key, None)
            yield file if locked else None


def _rows(limit: int | None) -> float:
    return math.inf if limit is None else limit


def _check_same(run: Run, options: dict[str, Any], place: Path) -> None:
    asked = options_of(run.config)
    for name, old in options.items():  # an option that came later had its default
        # Old records have a router's default where the model's option of the same name was what counted.
        ours = options.get(name.replace("router_options.", "model."), old)
        if (new := asked.get(name)) not in (old, ours):
            raise ConfigError(f"{place} was trained with {name} {old}, now {new} is asked for: move it away")


def _lock(file: IO[bytes]) -> bool:
    if os.name != "posix":  # elsewhere a file cannot be locked so
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
