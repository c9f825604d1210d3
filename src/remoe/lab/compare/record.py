"""A finished run's record: one small file with all that tables and figures need, which outlives the run's folder."""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from remoe.errors import ConfigError
from remoe.lab.analysis.collect import RoutingRecord, collect
from remoe.lab.analysis.summary import RoutingFigures, RoutingSummary, rounded, routing_of
from remoe.lab.data import Dataset, ValidationWindows, load_tokenizer
from remoe.lab.files import atomic_write
from remoe.lab.machine import pick_device
from remoe.lab.training.build import wants_bfloat16
from remoe.lab.training.config import TrainConfig, changes_result, flatten
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_run
from remoe.lab.training.metrics import iterate_metrics
from remoe.routing import ROUTERS, router_options
from remoe.stages import stage

TOKENS = 200_000
BATCH_SIZE = 32
COURSE = ("step", "lm_loss", "reg_loss", "lambda", "sparsity", "sparsity_per_layer", "flip_rate", "tokens_per_second")
LEFT_OUT = ("checkpoint", "sample")  # of the summary: a path, and text of no use to a table


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot accuracy of a trained model.

    Attributes:
        limit: rows of each task, at most; None for all.
        tasks: fields of `remoe.lab.evaluation.zeroshot.TaskResult`, by the task's name.
    """

    limit: int | None
    tasks: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """What is kept of a finished run.

    Attributes:
        options: those that change the result, by dotted names.
        summary: the run's summary.json.
        course: columns of its metrics.jsonl.
        routing: None for a model without pairs.
        zero_shot: None where it was not asked for.
        data: fingerprint of the training data; empty in records of before it was kept.
    """

    options: dict[str, Any]
    summary: dict[str, Any]
    course: dict[str, list]
    routing: RoutingSummary | None
    zero_shot: ZeroShot | None = None
    data: str = ""

    def steps(self) -> list[dict]:
        """The course, a record a step, as metrics.jsonl has it."""
        target, steps = self.summary["target_sparsity"], []
        for row in zip(*self.course.values(), strict=True):
            record = {name: value for name, value in zip(self.course, row, strict=True) if value is not None}
            steps.append(record | {"stage": stage(record["sparsity"], target)})
        return steps

    def flip_rates(self) -> tuple[list[int], list[float]]:
        """Steps, and the flip rate at each; empty where it was not measured."""
        pairs = [(record["step"], record["flip_rate"]) for record in self.steps() if "flip_rate" in record]
        return [step for step, _ in pairs], [rate for _, rate in pairs]

    def mean_flip_rates(self) -> tuple[float, float] | None:
        """Over the whole run, and over its last third; None where it was not measured."""
        steps, rates = self.flip_rates()
        late = [rate for step, rate in zip(steps, rates, strict=True) if 3 * step > 2 * steps[-1]]
        return (statistics.mean(rates), statistics.mean(late)) if rates else None

    def save(self, path: Path) -> None:
        """Writes JSON; half a file never has the name."""
        atomic_write(path, (json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Reads what `save` wrote, by this version or by one that kept more.

        Raises:
            ConfigError: when the file is damaged, or lacks something.
        """
        try:
            given = json.loads(path.read_text())
            if (routing := given["routing"]) is not None:
                figures = RoutingFigures(**_known(RoutingFigures, routing["figures"]))
                given["routing"] = RoutingSummary(**{**_known(RoutingSummary, routing), "figures": figures})
            if given.get("zero_shot") is not None:
                given["zero_shot"] = ZeroShot(**given["zero_shot"])
            return cls(**_known(cls, given))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a whole record ({error}): move it away") from error


def _known(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    return {known.name: given[known.name] for known in fields(cls) if known.name in given}


def options_of(config: TrainConfig) -> dict[str, Any]:
    """The options that change the result, by dotted names; with all that the router is built with among them."""
    known = router_options(ROUTERS[config.router]) if config.router in ROUTERS else {}
    given = config.router_options
    router = {f"router_options.{name}": given.get(name, option.default) for name, option in known.items()}
    return router | {name: value for name, value in flatten(config.to_dict()) if changes_result(name)}


def course_of(records: Iterable[Mapping[str, Any]]) -> dict[str, list]:
    """What is kept of metrics.jsonl, by column; None in a column where a step has no value."""
    columns = {name: [] for name in COURSE}
    for record in records:
        for name, column in columns.items():
            column.append(rounded(record.get(name)))
    return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def record_of(run: RunFolder, dataset: Dataset, data: str, device: str) -> RunRecord:
    """The record of a finished run, whose model is loaded to see how it routes.

    Args:
        run: its folder.
        dataset: what it was trained on.
        data: the dataset's fingerprint.
        device: for the forward passes.
    """
    course = course_of(iterate_metrics(run.metrics))
    summary = {name: value for name, value in json.loads(run.summary.read_text()).items() if name not in LEFT_OUT}
    routing, config = None, run.load_config()
    if (found := _collect(run, dataset, device)) is not None:
        tokenizer = load_tokenizer(run.tokenizer)
        routing = routing_of(found, config.k * config.granularity, lambda token: tokenizer.decode([token]))
    return RunRecord(options_of(config), summary, course, routing, data=data)


def _collect(run: RunFolder, dataset: Dataset, device: str) -> RoutingRecord | None:
    model, _, _ = load_run(run.path)
    if not model.config.routes_pairs:
        return None
    config, place = run.load_config(), pick_device(device)
    windows = ValidationWindows(dataset.validation, config.seq_len)
    bfloat16 = wants_bfloat16(config.dtype, place)  # as it was trained
    autocast = torch.autocast(place.type, dtype=torch.bfloat16, enabled=bfloat16)
    return collect(model.to(place), windows, TOKENS, BATCH_SIZE, autocast=autocast)
