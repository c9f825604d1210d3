"""Records of finished runs: all that tables and figures need, kept when a run's folder is gone.

A folder of records holds

NAME.json              the record of one run, written when the run ends
EXPERIMENT.jsonl.xz    many records, packed: a header with the names of the runs and the data, then one line per run
"""

import json
import lzma
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from remoe.errors import ConfigError
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.summary import RoutingFigures, RoutingSummary, rounded, routing_of
from remoe.lab.analysis.texts import PreparedText
from remoe.lab.compare.keys import FORMER_NAMES
from remoe.lab.data import Dataset, ValidationWindows
from remoe.lab.files import atomic_write, locked
from remoe.lab.machine import pick_device
from remoe.lab.nested import flatten
from remoe.lab.training.build import wants_bfloat16
from remoe.lab.training.changes import changes_result
from remoe.lab.training.config import FROM, TrainConfig
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_run
from remoe.lab.training.metrics import iterate_metrics
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import ROUTERS, router_options
from remoe.stages import stage

TOKENS = 200_000
COURSE = ("step", "lm_loss", "reg_loss", "lambda", "sparsity", "sparsity_per_layer", "flip_rate", "tokens_per_second")
LEFT_OUT = ("checkpoint", "sample")  # of the summary: a path, and text of no use to a table
PACKED = ".jsonl.xz"
FORMAT, VERSION = "remoe.records", 1
XZ = {"format": lzma.FORMAT_XZ, "check": lzma.CHECK_CRC64, "preset": 9 | lzma.PRESET_EXTREME}  # always the same bytes


@dataclass(frozen=True)
class DataDescription:
    """The data that runs were trained on, as a report names them.

    Attributes:
        fingerprint: of the dataset.
        domains: their names.
        training_tokens: tokens in the training part.
        validation_tokens: tokens in the validation part.
    """

    fingerprint: str
    domains: list[str]
    training_tokens: int
    validation_tokens: int

    @classmethod
    def of(cls, dataset: Dataset) -> "DataDescription":
        """The description of an open dataset."""
        train, validation = dataset.train.num_tokens, dataset.validation.num_tokens
        return cls(dataset.fingerprint, [*dataset.domains], train, validation)


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot accuracy of a trained model.

    Attributes:
        limit: maximum number of rows per task; None for all.
        tasks: the fields of `remoe.lab.evaluation.zeroshot.TaskResult`, by the task's name.
    """

    limit: int | None
    tasks: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """The record of a finished run.

    Attributes:
        options: the options that influence the result, by dotted names of today.
        summary: the run's summary.json.
        course: columns of the run's metrics.jsonl.
        routing: None for a model without (token, expert) pairs.
        zero_shot: None if it was not evaluated.
        data: fingerprint of the training data; empty in the oldest records, which did not keep it.
    """

    options: dict[str, Any]
    summary: dict[str, Any]
    course: dict[str, list]
    routing: RoutingSummary | None
    zero_shot: ZeroShot | None = None
    data: str = ""

    def steps(self) -> list[dict]:
        """The course as a list of records, one per logged step, as in metrics.jsonl."""
        target, steps = self.summary["target_sparsity"], []
        for row in zip(*self.course.values(), strict=True):
            record = {name: value for name, value in zip(self.course, row, strict=True) if value is not None}
            steps.append(record | {"stage": stage(record["sparsity"], target)})
        return steps

    def flip_rates(self) -> tuple[list[int], list[float]]:
        """The steps at which the flip rate was measured, and its values; empty if it was not measured."""
        pairs = [(record["step"], record["flip_rate"]) for record in self.steps() if "flip_rate" in record]
        return [step for step, _ in pairs], [rate for _, rate in pairs]

    def mean_flip_rates(self) -> tuple[float, float] | None:
        """The mean flip rate over the whole run and over its last third; None if it was not measured."""
        steps, rates = self.flip_rates()
        late = [rate for step, rate in zip(steps, rates, strict=True) if 3 * step > 2 * steps[-1]]
        return (statistics.mean(rates), statistics.mean(late)) if rates else None

    def save(self, path: Path) -> None:
        """Writes the record as JSON, atomically; raises DataError if that fails."""
        atomic_write(path, (json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Reads a record of this version or of 0.1.0.

        Raises:
            ConfigError: if the file is damaged or incomplete.
            FileNotFoundError: if there is no such file.
        """
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> "RunRecord":
        """The record that `content` holds; `source` says in error messages where it comes from.

        Raises:
            ConfigError: if it is damaged or incomplete.
        """
        try:
            given = json.loads(content)
            given["options"] = todays_names(given["options"])
            if (routing := given["routing"]) is not None:
                figures = RoutingFigures(**_known(RoutingFigures, routing["figures"]))
                given["routing"] = RoutingSummary(**{**_known(RoutingSummary, routing), "figures": figures})
            if given.get("zero_shot") is not None:
                given["zero_shot"] = ZeroShot(**given["zero_shot"])
            return cls(**_known(cls, given))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source} is not a complete record ({error}); move it away") from error


def _known(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    return {known.name: given[known.name] for known in fields(cls) if known.name in given}


class RecordFolder:
    """A folder of records, which several processes may read and write at the same time.

    A run's own file takes precedence over a packed record of the same name: it is newer.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._packs: dict[str, _Pack] = {}  # by the file's name
        self._seen: int | None = None  # modification time of the folder when the packed files were read

    def names(self) -> list[str]:
        """The names of the runs that have a record, sorted."""
        packed = (name for pack in self._read().values() for name in pack.lines)
        return sorted({*packed, *(path.stem for path in self.path.glob("[!.]*-*.json"))})

    def load(self, name: str) -> RunRecord | None:
        """The record of the run called `name`; None if there is none.

        Raises:
            ConfigError: if it is damaged.
        """
        try:
            return RunRecord.load(self.file(name))
        except FileNotFoundError:  # never written, or packed: packing writes the packed file first
            for file, pack in self._read().items():
                if name in pack.lines:
                    return RunRecord.parse(pack.lines[name], f"{self.path / file}, {name},")
        return None

    def file(self, name: str) -> Path:
        """The file of one run's record, before it is packed."""
        return self.path / f"{name}.json"

    def place(self, name: str) -> Path:
        """The file that holds a run's record, for messages."""
        packed = (self.path / file for file, pack in self._read().items() if name in pack.lines)
        return self.file(name) if self.file(name).exists() else next(packed, self.file(name))

    def save(self, name: str, record: RunRecord) -> None:
        """Writes one run's record to a file of its own; raises DataError if that fails."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, None):
            record.save(self.file(name))

    def data(self) -> list[DataDescription]:
        """The data of the packed runs, each once."""
        found = {one.fingerprint: one for pack in self._read().values() for one in pack.data}
        return [found[fingerprint] for fingerprint in sorted(found)]

    def forget(self) -> None:
        """Reads the folder afresh at the next access, even if it seems unchanged."""
        self._seen = None

    def pack(self, experiment: str, names: Sequence[str], data: DataDescription) -> None:
        """Moves the records of runs from their own files into EXPERIMENT.jsonl.xz.

        A run that another experiment has packed stays there and is replaced. Nothing is written if no run has a file
        of its own. A kill at any moment loses nothing.

        Args:
            experiment: the experiment's name.
            names: the names of its finished runs.
            data: what they were trained on.

        Raises:
            DataError: if writing fails.
            PermissionError: if a run's own file cannot be deleted.
        """
        if not any(self.file(name).exists() for name in names):
            return
        with locked(self.path, None):
            self.forget()
            packs, changed, moved = self._read(), {}, []
            for name in names:
                try:
                    content = self.file(name).read_bytes()
                except FileNotFoundError:  # packed before, perhaps by another process
                    continue
                line = json.dumps(json.loads(content), separators=(",", ":")).encode()
                file = next((file for file, pack in packs.items() if name in pack.lines), f"{experiment}{PACKED}")
                changed.setdefault(file, {})[name] = line
                moved.append(name)
            for file, lines in changed.items():
                packs.get(file, _Pack()).with_runs(lines, data).write(self.path / file)
            for name in moved:
                self.file(name).unlink(missing_ok=True)
            self.forget()

    def _read(self) -> dict[str, "_Pack"]:
        """The packed files; those that are unchanged are not read again."""
        try:
            seen = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if seen != self._seen:
            packs = {}
            for path in sorted(self.path.glob(f"[!.]*{PACKED}")):
                status = path.stat()
                version = (status.st_ino, status.st_size, status.st_mtime_ns)
                known = self._packs.get(path.name)
                packs[path.name] = known if known and known.version == version else _Pack.read(path, version)
            self._packs, self._seen = packs, seen
        return self._packs


@dataclass(frozen=True)
class _Pack:
    lines: Mapping[str, bytes] = field(default_factory=dict)  # JSON, by the run's name
    data: Sequence[DataDescription] = ()
    version: tuple[int, int, int] | None = None  # inode, size and modification time of the file

    def with_runs(self, lines: Mapping[str, bytes], data: DataDescription) -> "_Pack":
        known = {one.fingerprint: one for one in (*self.data, data)}
        return _Pack({**self.lines, **lines}, [known[fingerprint] for fingerprint in sorted(known)])

    def write(self, path: Path) -> None:
        names = sorted(self.lines)
        header = {"format": FORMAT, "version": VERSION, "data": [asdict(one) for one in self.data], "runs": names}
        lines = [json.dumps(header, separators=(",", ":")).encode(), *(self.lines[name] for name in names)]
        atomic_write(path, lzma.compress(b"".join(line + b"\n" for line in lines), **XZ))

    @classmethod
    def read(cls, path: Path, version: tuple[int, int, int]) -> "_Pack":
        try:
            first, *lines = lzma.decompress(path.read_bytes()).splitlines()
            header = json.loads(first)
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}")
            if header["version"] > VERSION:
                raise ConfigError(f"{path} was written by a newer version of remoe")
            data = [DataDescription(**one) for one in header["data"]]
            return cls(dict(zip(header["runs"], lines, strict=True)), data, version)
        except (lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a complete file of records ({error}); move it away") from error


def options_of(config: TrainConfig) -> dict[str, Any]:
    """The options that influence the result, by dotted names, including every option of the router.

    The folder that a run starts from is not among them: its weights are in the run's key, and may be moved.
    """
    known = router_options(ROUTERS[config.router]) if config.router in ROUTERS else {}
    router = {f"router_options.{name}": option.default for name, option in known.items()}
    options = {name: value for name, value in flatten(config.to_dict()) if changes_result(name) and name != FROM}
    return todays_names(router | options)


def todays_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted names, with those of version 0.1.0 under today's names.

    In 0.1.0 `load_balance` and `max_experts_per_token` were options of the model and of the router; the one that
    differed from the default counted. Routers without such an option ignored it.
    """
    router = options.get("router")
    known = router_options(ROUTERS[router]) if router in ROUTERS else {}
    found = {name: value for name, value in options.items() if name not in FORMER_NAMES}
    for old, (new, default) in FORMER_NAMES.items():
        group, _, name = new.partition(".")
        has_option = group != "router_options" or name in known
        if old in options and has_option and found.get(new, default) == default:
            found[new] = options[old]
    if found.get("model.backend") == "loop":
        found["model.backend"] = "cpu"
    return found


def course_of(records: Iterable[Mapping[str, Any]]) -> dict[str, list]:
    """The columns of metrics.jsonl that a record keeps; None in a column if a step has no value."""
    columns = {name: [] for name in COURSE}
    for record in records:
        for name, column in columns.items():
            column.append(rounded(record.get(name)))
    return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def record_of(run: RunFolder, dataset: Dataset, data: str, device: str) -> RunRecord:
    """Makes the record of a finished run; loads its model to measure the routing.

    Args:
        run: the run's folder.
        dataset: the data that the run was trained on.
        data: the dataset's fingerprint.
        device: where the forward passes run.
    """
    course = course_of(iterate_metrics(run.metrics))
    summary = {name: value for name, value in json.loads(run.summary.read_text()).items() if name not in LEFT_OUT}
    config = run.load_config()
    return RunRecord(options_of(config), summary, course, _routing(run, dataset, device), data=data)


def _routing(run: RunFolder, dataset: Dataset, device: str) -> RoutingSummary | None:
    model, tokenizer, _ = load_run(run.path)
    if isinstance(model, RemoeForCausalLM) and not model.config.routes_pairs:
        return None
    config, place = run.load_config(), pick_device(device)
    text = PreparedText(ValidationWindows(dataset.validation, config.seq_len), TOKENS)
    bfloat16 = wants_bfloat16(config.dtype, place)  # as it was trained
    autocast = torch.autocast(place.type, dtype=torch.bfloat16, enabled=bfloat16)
    end = dataset.eos_token_id if config.mask_documents else None
    options = {"losses": False, "document_end": end, "autocast": autocast}
    with tempfile.TemporaryDirectory() as folder:
        record = record_routing(Mixture(model.to(place)), text, Path(folder) / "record.parquet", **options)
        return routing_of(record, lambda token: tokenizer.decode([token]))
