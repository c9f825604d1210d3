"""A finished run's record: one small file with all that tables and figures need, which outlives the run's folder.

Legend: L layers, E experts, C domains, U distinct token ids.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.analysis import measures
from remoe.analysis.collect import RoutingRecord, collect
from remoe.data import Dataset, ValidationWindows, load_tokenizer
from remoe.data.files import atomic_write
from remoe.errors import ConfigError
from remoe.models.configuration_remoe import arguments_of_router
from remoe.routing import ROUTERS, router_options
from remoe.training.config import TrainConfig, changes_result, flatten
from remoe.training.metrics import read_metrics, stage
from remoe.training.rundir import RunFolder, load_run
from remoe.training.trainer import pick_device, wants_bfloat16

TOKENS = 200_000
BATCH_SIZE = 32
CHUNK = 8
MIN_COUNT = 10  # occurrences of a token id from which its mean active experts are looked at
TOP, TOP_MIN_COUNT = 8, 50  # tokens shown of an expert, and the occurrences from which one is
DIGITS = 4  # of every number of the course
COURSE = ("step", "lm_loss", "reg_loss", "lambda", "sparsity", "sparsity_per_layer", "flip_rate", "tokens_per_second")
LEFT_OUT = ("checkpoint", "sample")  # of the summary: a path, and text of no use to a table


@dataclass(frozen=True)
class RoutingFigures:
    """Measures of one run; a layer has None where it has nothing to measure, as without any routed pair.

    Attributes:
        inactive_experts: experts of all layers with less than an eighth of the wanted mean load.
        frequency_correlation: Spearman's, of a token id's active experts and its frequency; None where all ids have
            the same number.
        sparsity_per_layer: (L,).
        load_imbalance_per_layer: (L,), load of the busiest expert over the mean load.
        specialisation_per_layer: (L,), mutual information of expert and domain over the entropy of the domain.
        chunk_sparsity_per_layer: (L,), experts that none of 8 neighbouring tokens uses.
        expert_reuse_per_layer: (L,), share of a token's experts that the next token uses too. None, as the one above,
            in records of before they were kept by layer.
    """

    inactive_experts: int
    frequency_correlation: float | None
    sparsity_per_layer: list[float]
    load_imbalance_per_layer: list[float | None]
    specialisation_per_layer: list[float | None]
    chunk_sparsity_per_layer: list[float | None] | None = None
    expert_reuse_per_layer: list[float | None] | None = None

    @property
    def mean_chunk_sparsity(self) -> float | None:
        """The mean over all layers, as of S."""
        known = [value for value in self.chunk_sparsity_per_layer or [] if value is not None]
        return statistics.mean(known) if known else None

    def over_pairs(self, measure: str) -> float | None:
        """The mean of NAME_per_layer, each layer weighted by its routed pairs; None where no layer has a value.

        Without weights a layer that is almost closed would count as much as one that does all the work.
        """
        values = getattr(self, f"{measure}_per_layer") or []
        known = [
            (1 - sparsity, value)
            for sparsity, value in zip(self.sparsity_per_layer, values, strict=False)
            if value is not None and sparsity < 1
        ]
        if not known:
            return None
        return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)


@dataclass(frozen=True)
class RoutingSummary:
    """How a trained model routes about 200,000 validation tokens.

    Attributes:
        figures: its measures.
        share_LE: share of the tokens that each expert takes.
        share_CLE: the same of each domain's tokens.
        domains: names of those that have tokens, (C,).
        count_U: how often each token id occurs.
        active_U: its mean active experts.
        top_tokens: of each layer's experts, the text of the tokens that it takes most surely (Table 12); empty in
            records of before they were kept.
    """

    figures: RoutingFigures
    share_LE: list[list[float]]
    share_CLE: list[list[list[float]]]
    domains: list[str]
    count_U: list[int]
    active_U: list[float]
    top_tokens: list[list[list[str]]] = field(default_factory=list)


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot accuracy of a trained model.

    Attributes:
        limit: rows of each task, at most; None for all.
        tasks: fields of `remoe.zeroshot.TaskResult`, by the task's name.
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
    given = arguments_of_router(
        config.router, config.router_options, config.model.load_balance, config.model.max_experts_per_token
    )
    router = {f"router_options.{name}": given.get(name, option.default) for name, option in known.items()}
    return router | {name: value for name, value in flatten(config.to_dict()) if changes_result(name)}


def course_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """What is kept of metrics.jsonl, by column; None in a column where a step has no value."""
    names = [name for name in COURSE if any(name in record for record in records)]
    return {name: [_rounded(record.get(name)) for record in records] for name in names}


def record_of(run: RunFolder, dataset: Dataset, data: str, device: str) -> RunRecord:
    """The record of a finished run, whose model is loaded to see how it routes.

    Args:
        run: its folder.
        dataset: what it was trained on.
        data: the dataset's fingerprint.
        device: for the forward passes.
    """
    course = course_of(read_metrics(run.metrics))
    summary = {name: value for name, value in json.loads(run.summary.read_text()).items() if name not in LEFT_OUT}
    routing, config = None, run.load_config()
    if (found := _collect(run, dataset, device)) is not None:
        tokenizer = load_tokenizer(run.tokenizer)
        routing = routing_of(found, config.k * config.granularity, lambda token: tokenizer.decode([token]))
    return RunRecord(options_of(config), summary, course, routing, data=data)


def routing_of(record: RoutingRecord, k: int, text_of: Callable[[int], str]) -> RoutingSummary:
    """The measures of a model's routing, and what is shown of it.

    Args:
        record: the routing.
        k: wanted active experts per token.
        text_of: the text of a token id.
    """
    active_LTE = record.active_LTE
    by_token = measures.active_by_token(active_LTE, record.token_T, min_count=MIN_COUNT)
    correlation = by_token.frequency_correlation
    special = measures.specialisation(active_LTE, record.domain_T, len(record.domains))
    share_LE = measures.routed_share(active_LTE)
    figures = RoutingFigures(
        inactive_experts=int(measures.inactive_experts(share_LE, k).sum()),
        frequency_correlation=None if math.isnan(correlation) else correlation,
        sparsity_per_layer=measures.sparsity_per_layer(active_LTE).tolist(),
        load_imbalance_per_layer=_known_numbers(measures.load_imbalance(active_LTE)),
        specialisation_per_layer=_known_numbers(special.normalised_L),
        chunk_sparsity_per_layer=_known_numbers(measures.chunk_sparsity(active_LTE, record.sequence_T, CHUNK)),
        expert_reuse_per_layer=_known_numbers(measures.expert_reuse(active_LTE, record.sequence_T)),
    )
    top_tokens = [
        [
            [text_of(top.token) for top in tops]
            for tops in measures.top_tokens(active_TE, record.token_T, TOP, min_count=TOP_MIN_COUNT)
        ]
        for active_TE in active_LTE
    ]
    seen_C = torch.bincount(record.domain_T, minlength=len(record.domains)) > 0
    share_CLE = measures.routed_share_by_domain(active_LTE, record.domain_T, len(record.domains))[seen_C]
    return RoutingSummary(
        figures,
        _rounded(share_LE.tolist()),
        _rounded(share_CLE.tolist()),
        [domain for domain, seen in zip(record.domains, seen_C.tolist(), strict=True) if seen],
        by_token.count_U.tolist(),
        _rounded(by_token.active_U.tolist()),
        top_tokens,
    )


def _collect(run: RunFolder, dataset: Dataset, device: str) -> RoutingRecord | None:
    model, _, _ = load_run(run.path)
    if not model.config.routes_pairs:
        return None
    config, place = run.load_config(), pick_device(device)
    windows = ValidationWindows(dataset.validation, config.seq_len)
    bfloat16 = wants_bfloat16(config.dtype, place)  # as it was trained
    autocast = torch.autocast(place.type, dtype=torch.bfloat16, enabled=bfloat16)
    return collect(model.to(place), windows, TOKENS, BATCH_SIZE, autocast=autocast)


def _known_numbers(value_L: Tensor) -> list[float | None]:
    """JSON has no NaN: None."""
    return [None if math.isnan(value) else _rounded(value) for value in value_L.tolist()]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
