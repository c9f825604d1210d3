"""A finished run's record: one small file with all that tables and figures need, which outlives the run's folder.

Legend: L layers, E experts, C domains, U distinct token ids.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from remoe.analysis import measures
from remoe.analysis.collect import RoutingRecord, collect
from remoe.data import Dataset, ValidationWindows, load_tokenizer
from remoe.errors import ConfigError
from remoe.training.config import TrainConfig, changes_result, flatten
from remoe.training.metrics import read_metrics, stage
from remoe.training.rundir import RunFolder, load_run
from remoe.training.trainer import pick_device

TOKENS = 200_000
BATCH_SIZE = 32
CHUNK = 8
MIN_COUNT = 10  # occurrences of a token id from which its mean active experts are looked at
TOP, TOP_MIN_COUNT = 8, 50  # tokens shown of an expert, and the occurrences from which one is
DIGITS = 4  # of every number of the course
COURSE = ("step", "lm_loss", "reg_loss", "lambda", "sparsity", "sparsity_per_layer", "flip_rate")
LEFT_OUT = ("checkpoint", "sample")  # of the summary: a path, and text of no use to a table


@dataclass(frozen=True)
class RoutingFigures:
    """Measures of one run; means over layers where a measure has a value for each.

    Attributes:
        inactive_experts: experts of all layers that take less than 1/64 of the tokens.
        load_imbalance: load of the busiest expert over the mean load.
        specialisation: mutual information of expert and domain over the entropy of the domain.
        frequency_correlation: Spearman's, of a token id's active experts and its frequency; None where all ids have
            the same number.
        chunk_sparsity: experts that none of 8 neighbouring tokens uses.
        expert_reuse: share of a token's experts that the next token uses too.
        sparsity_per_layer: (L,).
        flip_rate: mean over the training of the share of pairs that a step changes; None where it was not measured.
    """

    inactive_experts: int
    load_imbalance: float
    specialisation: float
    frequency_correlation: float | None
    chunk_sparsity: float
    expert_reuse: float
    sparsity_per_layer: list[float]
    flip_rate: float | None


@dataclass(frozen=True)
class RoutingSummary:
    """How a trained model routes about 200,000 validation tokens.

    Attributes:
        figures: its measures.
        share_LE: share of the tokens that each expert takes.
        share_CLE: the same of each domain's tokens.
        domains: their names, (C,).
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
class RunRecord:
    """What is kept of a finished run.

    Attributes:
        options: those that change the result, by dotted names.
        summary: the run's summary.json.
        course: columns of its metrics.jsonl.
        routing: None for a model without pairs.
    """

    options: dict[str, Any]
    summary: dict[str, Any]
    course: dict[str, list]
    routing: RoutingSummary | None

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

    def save(self, path: Path) -> None:
        """Writes JSON; half a file never has the name."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n")
        partial.replace(path)

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
            return cls(**_known(cls, given))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a whole record ({error}): move it away") from error


def _known(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    return {known.name: given[known.name] for known in fields(cls) if known.name in given}


def options_of(config: TrainConfig) -> dict[str, Any]:
    """The options that change the result, by dotted names."""
    return {name: value for name, value in flatten(config.to_dict()) if changes_result(name)}


def record_of(run: RunFolder, dataset: Dataset, device: str) -> RunRecord:
    """The record of a finished run, whose model is loaded to see how it routes."""
    records = read_metrics(run.metrics)
    names = [name for name in COURSE if any(name in record for record in records)]
    course = {name: [_rounded(record.get(name)) for record in records] for name in names}
    summary = {name: value for name, value in json.loads(run.summary.read_text()).items() if name not in LEFT_OUT}
    rates = [record["flip_rate"] for record in records if "flip_rate" in record]
    routing = None
    if (found := _collect(run, dataset, device)) is not None:
        tokenizer = load_tokenizer(run.tokenizer)
        routing = routing_of(found, statistics.mean(rates) if rates else None, lambda token: tokenizer.decode([token]))
    return RunRecord(options_of(run.load_config()), summary, course, routing)


def routing_of(record: RoutingRecord, flip_rate: float | None, text_of: Callable[[int], str]) -> RoutingSummary:
    """The measures of a model's routing, and what is shown of it.

    Args:
        record: the routing.
        flip_rate: mean over the training, where it was measured.
        text_of: the text of a token id.
    """
    active_LTE = record.active_LTE
    by_token = measures.active_by_token(active_LTE, record.token_T, min_count=MIN_COUNT)
    correlation = by_token.frequency_correlation
    special = measures.specialisation(active_LTE, record.domain_T, len(record.domains))
    share_LE = measures.routed_share(active_LTE)
    figures = RoutingFigures(
        inactive_experts=int(measures.inactive_experts(share_LE).sum()),
        load_imbalance=measures.load_imbalance(active_LTE).mean().item(),
        specialisation=special.normalised_L.mean().item(),
        frequency_correlation=None if math.isnan(correlation) else correlation,
        chunk_sparsity=measures.chunk_sparsity(active_LTE, record.sequence_T, CHUNK).mean().item(),
        expert_reuse=measures.expert_reuse(active_LTE, record.sequence_T).mean().item(),
        sparsity_per_layer=measures.sparsity_per_layer(active_LTE).tolist(),
        flip_rate=flip_rate,
    )
    top_tokens = [
        [
            [text_of(top.token) for top in tops]
            for tops in measures.top_tokens(active_TE, record.token_T, TOP, min_count=TOP_MIN_COUNT)
        ]
        for active_TE in active_LTE
    ]
    share_CLE = measures.routed_share_by_domain(active_LTE, record.domain_T, len(record.domains))
    return RoutingSummary(
        figures,
        _rounded(share_LE.tolist()),
        _rounded(share_CLE.tolist()),
        list(record.domains),
        by_token.count_U.tolist(),
        _rounded(by_token.active_U.tolist()),
        top_tokens,
    )


def _collect(run: RunFolder, dataset: Dataset, device: str) -> RoutingRecord | None:
    model, _, _ = load_run(run.path)
    if not model.config.routes_pairs:
        return None
    windows = ValidationWindows(dataset.validation, run.load_config().seq_len)
    return collect(model.to(pick_device(device)), windows, TOKENS, BATCH_SIZE)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
