"""Figures of a run, a record or a model, for notebooks and scripts: every function returns a matplotlib figure.

    from remoe import plots

    plots.training("runs/relu", "runs/topk")        # two runs, from their metrics
    seen = plots.routing("runs/relu", data="DATA")  # runs the model once, for several figures
    plots.experts(seen)
    plots.domains("record.parquet")                 # what `remoe record` wrote

`training`, `losses`, `load` and `flips` take folders of runs. `experts`, `domains` and `frequency` take what `routing`
takes, or what it returned. The figures are those of `remoe compare` and `remoe report`; numbers refer to ReMoE
(arXiv 2412.14711). They need `pip install 'remoe[lab]'`.

Legend: N sequences, S sequence length, L layers, E experts.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from remoe.errors import ConfigError, missing_extra

try:
    from matplotlib.figure import Figure
    from torch import Tensor

    from remoe.lab.analysis import figures, routing_figures
    from remoe.lab.analysis.mixture import Mixture
    from remoe.lab.analysis.record import RoutingRecord, is_record
    from remoe.lab.analysis.recording import record_routing
    from remoe.lab.analysis.source import open_source
    from remoe.lab.analysis.summary import RoutingSummary, routing_of
    from remoe.lab.analysis.texts import Prompt, Text, TokenIds, TokenTexts
    from remoe.lab.training.config import TrainConfig
    from remoe.lab.training.folder import RunFolder
    from remoe.lab.training.metrics import iterate_metrics
    from remoe.routing import ROUTERS
except ModuleNotFoundError as error:
    raise missing_extra(error, "lab", "remoe.plots") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Measured", "domains", "experts", "flips", "frequency", "load", "losses", "routing", "training"]

LOSS_WINDOW = 20  # records in the moving mean
TOKENS = 50_000  # that a model reads by default


@dataclass(frozen=True)
class Measured:
    """The routing of a model on some text, as `routing` returns it.

    Attributes:
        name: in the figures.
        k: target number of active experts per token, exact or on average.
        summary: the measures.
    """

    name: str
    k: int
    summary: RoutingSummary


Source: TypeAlias = str | Path | RoutingRecord | Measured


def routing(
    source: "str | Path | RoutingRecord | PreTrainedModel",
    data: str | None = None,
    *,
    prompt: str | None = None,
    tokens: Tensor | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_tokens: int = TOKENS,
    name: str | None = None,
) -> Measured:
    """Measures the routing of a model once, for several figures.

    Args:
        source: folder of a run, a checkpoint or a model; a record, or its file; or a model in memory, any mixture that
            `remoe record` takes.
        data: what the model of a folder reads: prepared data or raw text; by default the run's own data.
        prompt: text to read instead; for a model in memory, with its `tokenizer`.
        tokens: (N, S) int64 token ids that a model in memory reads.
        tokenizer: of a model in memory.
        max_tokens: approximate number of tokens that the model of a folder reads.
        name: in the figures; by default the name of the folder or file, or the model's class.

    Raises:
        ConfigError: for a model without routing, without text, or a record with text.
        CheckpointError, DataError: as `remoe record`.
    """
    if isinstance(source, str | Path | RoutingRecord):
        if tokens is not None or tokenizer is not None:
            raise ConfigError("tokens and tokenizer are for a model in memory; give data or prompt")
        return _of_files(source, data, prompt, max_tokens, name)
    if data is not None or (prompt is None) == (tokens is None) or (prompt is not None and tokenizer is None):
        raise ConfigError("a model in memory reads either tokens, or a prompt by its tokenizer")
    mixture = Mixture(source)
    longest = mixture.longest or len(prompt or "")
    text: Text = TokenIds(tokens) if tokens is not None else Prompt(prompt, tokenizer, longest, special=False)
    texts = TokenTexts(tokenizer) if tokenizer is not None else None
    record = record_routing(mixture, text, texts=texts, losses=False)
    return Measured(name or type(source).__name__, record.about.k, routing_of(record))


def training(*runs: str | Path, log_steps: bool = False) -> Figure:
    """Sparsity, lambda, penalty and loss of runs during training (Fig. 3, 4).

    Args:
        runs: their folders; they may still be training.
        log_steps: whether the step axis is logarithmic, which shows the first stages of a long run.

    Raises:
        CheckpointError: for a folder that is not a run.
        ConfigError: for a run without records.
    """
    folders = _run_folders(runs)
    targets = {_target(folder.load_config()) for folder in folders.values()}
    target = targets.pop() if len(targets) == 1 else None
    courses = {name: _course(folder) for name, folder in folders.items()}
    return figures.training_course(courses, target, log_steps=log_steps)


def losses(*runs: str | Path, window: int = LOSS_WINDOW) -> Figure:
    """Training loss of runs: all steps, and an enlargement of the last third.

    Args:
        runs: their folders.
        window: number of records in the moving mean.

    Raises:
        CheckpointError, ConfigError: as `training`.
    """
    columns = {name: _columns(folder, "lm_loss") for name, folder in _run_folders(runs).items()}
    return figures.training_losses(columns, window=window)


def load(run: str | Path) -> Figure:
    """Load of each expert of a run during training, one map per layer.

    Args:
        run: its folder.

    Raises:
        CheckpointError: for a folder that is not a run.
        ConfigError: for a run without records, or whose router sends no single tokens to experts.
    """
    ((_, folder),) = _run_folders([run]).items()
    config = folder.load_config()
    if not ROUTERS[config.router].routes_pairs:
        raise ConfigError(f"{folder.path}: router {config.router!r} does not send single tokens to experts")
    return routing_figures.load_course(*_columns(folder, "load_per_expert"), config.active_per_token)


def flips(*runs: str | Path) -> Figure:
    """How fast the routing of runs changes during training (Fig. 10).

    Args:
        runs: their folders; they were trained with `--validate.flips-every N`.

    Raises:
        CheckpointError: for a folder that is not a run.
        ConfigError: for a run whose flip rate was not measured.
    """
    folders = _run_folders(runs)
    experts = {name: folder.load_config().experts_per_layer for name, folder in folders.items()}
    return routing_figures.flips({name: _columns(folder, "flip_rate") for name, folder in folders.items()}, experts)


def experts(*sources: Source) -> Figure:
    """Share of the tokens that each expert of each layer takes (Fig. 8), one map per source.

    Args:
        sources: as `routing` takes them from files, or what it returned.

    Raises:
        ConfigError, CheckpointError, DataError: as `routing`.
    """
    found = _measured(sources)
    return routing_figures.routed_share_maps(
        {name: one.summary.share_LE for name, one in found.items()}, {name: one.k for name, one in found.items()}
    )


def domains(source: Source) -> Figure:
    """Share of each domain's tokens that each expert takes (Fig. 9, 12).

    Args:
        source: as `routing` takes it from a file, or what it returned.

    Raises:
        ConfigError, CheckpointError, DataError: as `routing`.
    """
    ((_, one),) = _measured([source]).items()
    return routing_figures.routed_share_by_domain(one.summary.share_CLE, one.summary.domains, one.k)


def frequency(*sources: Source) -> Figure:
    """Active experts of each token id against the number of its occurrences (Fig. 7), one panel per source.

    Args:
        sources: as `routing` takes them from files, or what it returned.

    Raises:
        ConfigError: if no token id occurs ten times; and as `routing`.
        CheckpointError, DataError: as `routing`.
    """
    found = _measured(sources)
    for name, one in found.items():
        if not one.summary.count_U:
            raise ConfigError(f"{name}: no token id occurs ten times, so that there is nothing to draw; read more text")
    return routing_figures.active_against_frequency(
        {name: (one.summary.count_U, one.summary.active_U) for name, one in found.items()}
    )


def _of_files(
    source: str | Path | RoutingRecord, data: str | None, prompt: str | None, max_tokens: int, name: str | None
) -> Measured:
    if not isinstance(source, RoutingRecord) and is_record(source):
        source = RoutingRecord(Path(source))
    if isinstance(source, RoutingRecord):
        if data is not None or prompt is not None:
            raise ConfigError(f"{source.name} is a record of a text that was read: data and prompt do not go with it")
        return Measured(name or (source.path.stem if source.path else source.name), source.about.k, routing_of(source))
    opened = open_source(str(source), data, prompt, max_tokens=max_tokens)
    if opened.mixture is None:
        raise ConfigError(f"{source}: its router does not send single tokens to experts: there is no routing")
    with tempfile.TemporaryDirectory() as scratch:
        record = opened.record(Path(scratch) / "record.parquet")
        summary = routing_of(record, lambda token: opened.tokenizer.decode([token]))
        folder = opened.run.path if opened.run else Path(source)
        return Measured(name or folder.resolve().name, record.about.k, summary)


def _measured(sources: Sequence[Source]) -> dict[str, Measured]:
    if not sources:
        raise ConfigError("name at least one source")
    found = [one if isinstance(one, Measured) else routing(one) for one in sources]
    return dict(zip(_distinct([one.name for one in found]), found, strict=True))


def _run_folders(runs: Sequence[str | Path]) -> dict[str, RunFolder]:
    if not runs:
        raise ConfigError("name at least one run")
    names = _distinct([os.path.basename(os.path.abspath(run)) for run in runs])
    return dict(zip(names, map(RunFolder, runs), strict=True))


def _distinct(names: list[str]) -> list[str]:
    """The names; those that were there before with a number behind them."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        found.append(next(one for one in chain([name], numbered) if one not in found))
    return found


def _columns(folder: RunFolder, name: str) -> tuple[list[int], list]:
    """Steps and values of the records that have this one; raises ConfigError if none has."""
    folder.load_config()
    records = iterate_metrics(folder.metrics) if folder.metrics.is_file() else ()
    pairs = [(record["step"], record[name]) for record in records if name in record]
    if not pairs:
        raise ConfigError(f"{folder.path} has no records of {name} yet")
    steps, values = zip(*pairs, strict=True)
    return [*steps], [*values]


def _course(folder: RunFolder) -> list[dict]:
    """The records of the metrics, without the load of each expert, which takes the most memory."""
    folder.load_config()
    records = iterate_metrics(folder.metrics) if folder.metrics.is_file() else ()
    found = [{name: value for name, value in record.items() if name != "load_per_expert"} for record in records]
    if not found:
        raise ConfigError(f"{folder.path} has no records of training yet")
    return found


def _target(config: TrainConfig) -> float | None:
    """Target sparsity, if the router has one."""
    routed = ROUTERS[config.router].routes_pairs
    return 1 - config.active_per_token / config.experts_per_layer if routed else None
