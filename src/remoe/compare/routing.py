"""How the finished models route validation tokens: collected once a run, and measured.

Legend: L layers, T tokens, E experts.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from remoe.analysis import measures
from remoe.analysis.collect import RoutingRecord, collect
from remoe.data import Dataset, ValidationWindows
from remoe.training.metrics import read_metrics
from remoe.training.rundir import RunFolder, load_run
from remoe.training.trainer import pick_device

TOKENS = 200_000
BATCH_SIZE = 32
CHUNK = 8
MIN_COUNT = 10  # occurrences of a token id from which its mean active experts are looked at


@dataclass(frozen=True)
class RoutingFigures:
    """Measures of one run; means over layers where a measure has a value for each.

    Attributes:
        inactive_experts: experts of all layers that take less than 1/64 of the tokens.
        load_imbalance: load of the busiest expert over the mean load.
        specialisation: mutual information of expert and domain over the entropy of the domain.
        frequency_correlation: Spearman's, of a token id's active experts and its frequency; NaN where all ids have
            the same number.
        chunk_sparsity: experts that none of 8 neighbouring tokens uses.
        expert_reuse: share of a token's experts that the next token uses too.
        sparsity_per_layer: (L,).
        flip_rate: mean over the training of the share of pairs that a step changes; None where it was not measured.
    """

    inactive_experts: int
    load_imbalance: float
    specialisation: float
    frequency_correlation: float
    chunk_sparsity: float
    expert_reuse: float
    sparsity_per_layer: list[float]
    flip_rate: float | None


def routing_record(run: RunFolder, dataset: Dataset, device: str) -> RoutingRecord | None:
    """The routing of about 200,000 validation tokens, kept in the run's folder; None for a model without pairs."""
    path = Path(run.path) / "routing.safetensors"
    if path.exists():
        return RoutingRecord.load(path)
    model, _, _ = load_run(run.path)
    if not model.config.routes_pairs:
        return None
    windows = ValidationWindows(dataset.validation, run.load_config().seq_len)
    record = collect(model.to(pick_device(device)), windows, TOKENS, BATCH_SIZE)
    partial = path.with_suffix(".partial")
    record.save(partial)
    partial.replace(path)
    return record


def flip_rates(run: RunFolder) -> tuple[list[int], list[float]]:
    """Steps, and the flip rate at each; empty where it was not measured."""
    records = [record for record in read_metrics(run.metrics) if "flip_rate" in record]
    return [record["step"] for record in records], [record["flip_rate"] for record in records]


def routing_figures(record: RoutingRecord, run: RunFolder) -> RoutingFigures:
    """The measures of a run."""
    active_LTE = record.active_LTE
    _, rates = flip_rates(run)
    by_token = measures.active_by_token(active_LTE, record.token_T, min_count=MIN_COUNT)
    special = measures.specialisation(active_LTE, record.domain_T, len(record.domains))
    return RoutingFigures(
        inactive_experts=int(measures.inactive_experts(measures.routed_share(active_LTE)).sum()),
        load_imbalance=measures.load_imbalance(active_LTE).mean().item(),
        specialisation=special.normalised_L.mean().item(),
        frequency_correlation=by_token.frequency_correlation,
        chunk_sparsity=measures.chunk_sparsity(active_LTE, record.sequence_T, CHUNK).mean().item(),
        expert_reuse=measures.expert_reuse(active_LTE, record.sequence_T).mean().item(),
        sparsity_per_layer=measures.sparsity_per_layer(active_LTE).tolist(),
        flip_rate=statistics.mean(rates) if rates else None,
    )
