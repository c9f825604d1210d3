"""The pool: a folder of runs that experiments share.

POOL/LABEL-HASH/        a run's folder, as written by `remoe train`; the run is finished if it has a summary.json
POOL/LABEL-HASH.yaml    the options that the run was started with
POOL/LABEL-HASH.log     its output
POOL/.HASH.lock         locked while it trains
POOL/LABEL-HASH.json    the record of a finished run, unless records have a folder of their own

A run that has a record is finished, with or without its folder.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from remoe.errors import ConfigError
from remoe.lab.compare.experiment import RunSpec
from remoe.lab.compare.keys import key_of, other_keys_of
from remoe.lab.compare.record import RecordFolder, RunRecord, ZeroShot, course_of, options_of, record_of
from remoe.lab.data import Dataset
from remoe.lab.files import try_lock
from remoe.lab.machine import pick_device
from remoe.lab.training.checkpoint import checkpoint_step
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.metrics import fill_steps, iterate_metrics

HASH_LENGTH = 8
LIST_SECONDS = 1.0
State = Literal["finished", "unfinished", "not started"]


@dataclass(frozen=True)
class Tasks:
    """Zero-shot tasks from `zeroshot.load_tasks`, and the maximum number of rows of each; None for all."""

    loaded: dict[str, Any]
    limit: int | None


class Pool:
    """The runs on one dataset, in a folder.

    Args:
        path: the pool's folder.
        data: fingerprint of the data.
        records: folder of the finished runs' records; the pool's own by default.
        bfloat16: whether `--dtype auto` means bfloat16 on the runs' device. Such runs differ from those in float32.
        tasks: zero-shot tasks that records must have, as long as the run's checkpoints exist.
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
        self.path, self.records = path, RecordFolder(records or path)
        self._data, self._bfloat16, self._tasks = data, bfloat16, tasks
        self._folders: dict[str, str] = {}  # names by hash; a run keeps the name that it has
        self._files: dict[str, str] = {}  # the same for records, which may have been made elsewhere
        self._records: dict[str, RunRecord] = {}  # by the run's key
        self._recordless: dict[str, RunRecord] = {}  # of finished runs without a record, made from their folders
        self._hashes: dict[str, list[str]] = {}  # by the run's key
        self._listed = -math.inf

    def name(self, run: RunSpec) -> str:
        """LABEL-HASH; a run that exists under another label keeps that label."""
        return self._name(run, self._folders, self._files)

    def record_name(self, run: RunSpec) -> str:
        """The same for the run's record, which may have another label than its folder."""
        return self._name(run, self._files, self._folders)

    def _name(self, run: RunSpec, *known: dict[str, str]) -> str:
        hashes = self._hashes_of(run)
        if not any(one in names for names in known for one in hashes):
            self._list()
        found = (names[one] for names in known for one in hashes if one in names)
        return next(found, f"{run.label}-{hashes[0]}")

    def _hashes_of(self, run: RunSpec) -> list[str]:
        """The run's hash, and those that it may have had in version 0.1.0."""
        if run.key not in self._hashes:
            # An explicit dtype and `auto` on a device that means it are the same run.
            dtype, config = run.config.dtype, replace(run.config, dtype="auto")
            kind = " bfloat16" if dtype == "bfloat16" or (dtype == "auto" and self._bfloat16) else ""
            content = [f"{key} {self._data}{kind}" for key in (key_of(config), *other_keys_of(config))]
            self._hashes[run.key] = [hashlib.sha256(one.encode()).hexdigest()[:HASH_LENGTH] for one in content]
        return self._hashes[run.key]

    def _list(self) -> None:
        """Finds the names of existing runs, at most once a second: the live table asks for names continuously."""
        if time.monotonic() - self._listed < LIST_SECONDS:
            return
        folders = [path.name for path in self.path.glob("[!.]*-*") if path.is_dir()]
        for names, found in ((self._folders, folders), (self._files, self.records.names())):
            for name in sorted(found):
                names.setdefault(name[-HASH_LENGTH:], name)
        self._listed = time.monotonic()

    def folder(self, run: RunSpec) -> RunFolder:
        """The run's folder; it need not exist."""
        return RunFolder(self.path / self.name(run))

    def options_file(self, run: RunSpec) -> Path:
        """The file with the options that the run was started with."""
        return self.path / f"{self.name(run)}.yaml"

    def summary(self, run: RunSpec) -> dict | None:
        """The summary of a finished run; None for any other run.

        Raises:
            ConfigError: if the run was trained with defaults different from today's.
        """
        found = self._found(run)
        return None if found is None else found.summary

    def sparsities(self, run: RunSpec) -> list[float]:
        """S of each training step of a finished run; a step that was not logged takes the next logged value."""
        course = self._found(run).course
        return fill_steps(course["step"], course["sparsity"])

    def layer_sparsities(self, run: RunSpec) -> list[list[float]] | None:
        """S of each layer at each training step of a finished run; None for a model without pairs."""
        course = self._found(run).course
        if "sparsity_per_layer" not in course:
            return None
        return fill_steps(course["step"], course["sparsity_per_layer"])

    def step_minutes(self, run: RunSpec) -> list[float] | None:
        """Duration of each training step of a finished run, in minutes; None if its record lacks it."""
        found = self._found(run)
        if "tokens_per_second" not in found.course:
            return None
        tokens = found.summary["tokens"] / found.summary["steps"]
        return [tokens / speed / 60 for speed in fill_steps(found.course["step"], found.course["tokens_per_second"])]

    def zero_shot(self, run: RunSpec) -> ZeroShot | None:
        """Zero-shot accuracies of a finished run; None if its record has none."""
        return self._found(run).zero_shot

    def _found(self, run: RunSpec) -> RunRecord | None:
        """A finished run's record, or as much of one as its folder gives; None for any other run."""
        if run.key in self._records:
            return self._records[run.key]
        folder, name = self.folder(run), self.record_name(run)
        if (found := self.records.load(name)) is not None:
            place, known = self.records.place(name), self._records
            if found.data not in ("", self._data):
                raise ConfigError(f"{place} is the record of a run on other data; move it away")
        elif run.key in self._recordless:
            return self._recordless[run.key]
        else:
            try:
                summary = json.loads(folder.summary.read_text())
            except (FileNotFoundError, ValueError):  # incomplete if its process was killed while writing
                return None
            course = course_of(iterate_metrics(folder.metrics))
            found = RunRecord(options_of(folder.load_config()), summary, course, None)
            place, known = folder.path, self._recordless
        # The hash includes the dtype; "auto" matters only if the run continues, perhaps on another device.
        options = {name: value for name, value in found.options.items() if name != "dtype"}
        _check_same(run, options, place)
        known[run.key] = found
        return found

    def record(self, run: RunSpec, dataset: Dataset, device: str) -> RunRecord:
        """The record of a finished run; made now if it is missing.

        Args:
            run: a finished run.
            dataset: the pool's data, to measure the routing of validation tokens.
            device: where the forward passes run.
        """
        if self.has_record(run):
            return self._found(run)
        return self._save(run, record_of(self.folder(run), dataset, self._data, device))

    def has_record(self, run: RunSpec) -> bool:
        """Whether the run is finished and has a record."""
        return self._found(run) is not None and run.key in self._records

    def add_tasks(self, run: RunSpec, device: str, stop: Callable[[], bool] = lambda: False) -> None:
        """Evaluates the zero-shot tasks that a run's record lacks, and saves the record after each.

        If the record has at least as many rows per task as requested, further tasks get as many rows as it has;
        otherwise the new results replace the old ones.

        Args:
            run: a run with a record.
            device: where the forward passes run.
            stop: called before each task; True ends the evaluation.
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

    def _save(self, run: RunSpec, record: RunRecord) -> RunRecord:
        self.records.save(self.record_name(run), record)
        self._records[run.key] = record
        return record

    def _missing_tasks(self, run: RunSpec) -> list[str]:
        """Requested tasks that the record lacks, or has with fewer rows, and that can be evaluated."""
        if self._tasks is None:
            return []
        last = self.folder(run).last_checkpoint()
        if last is None or checkpoint_step(last) != run.steps:  # the folder is of an unfinished run
            return []
        known = self.zero_shot(run)
        enough = {} if known is None or _rows(known.limit) < _rows(self._tasks.limit) else known.tasks
        return [task for task in self._tasks.loaded if task not in enough]

    def recorded(self, run: RunSpec) -> bool:
        """Whether the run is finished, and its record exists and has all tasks."""
        return self.has_record(run) and not self._missing_tasks(run)

    def state(self, run: RunSpec) -> State:
        """How far a run is.

        Raises:
            ConfigError: as `summary`, also for an unfinished run.
        """
        if self.summary(run) is not None:
            return "finished"
        if not (folder := self.folder(run)).config.exists():
            return "not started"
        _check_same(run, options_of(folder.load_config()), folder.path)
        return "unfinished"

    def record_file(self, run: RunSpec) -> Path:
        """The file that a finished run's record is written to; it may be packed later."""
        return self.records.file(self.record_name(run))

    def log_file(self, run: RunSpec) -> Path:
        """The file that the run's output goes to."""
        return self.path / f"{self.name(run)}.log"

    @contextmanager
    def claimed(self, run: RunSpec) -> Iterator[IO[bytes] | None]:
        """Locks the run against other processes; yields the locked file, or None if another process has it.

        A child process that inherits the file also holds the lock, so a run stays locked while it trains even if its
        parent is killed. The lock's name is the hash alone, because two experiments may give a run different labels.
        """
        with (self.path / f".{self._hashes_of(run)[0]}.lock").open("ab") as file:
            locked = try_lock(file)
            if locked:  # the previous owner may have created the run's folder or changed its record
                self._listed = -math.inf
                self.records.forget()
                self._records.pop(run.key, None)
            yield file if locked else None


def _rows(limit: int | None) -> float:
    return math.inf if limit is None else limit


def _check_same(run: RunSpec, options: dict[str, Any], place: Path) -> None:
    asked = options_of(run.config)
    for name, old in options.items():  # an option that was added later had its default
        if (new := asked.get(name)) != old:
            raise ConfigError(f"{place} was trained with {name} {old}, but {new} is requested; move it away")
