"""Figures of training and of comparisons: each function takes runs by name and returns a matplotlib figure.

Figure numbers refer to ReMoE, arXiv 2412.14711. `look` gives the colours and markers of the runs, by default
`looks(runs)`. Figures of routing are in `routing_figures`.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from remoe.lab.analysis.style import (
    GREY,
    MAX_LEGEND,
    STYLE,
    Look,
    label,
    legend_columns,
    looks,
    new_figure,
    number_axis,
    plain,
    quantity,
    save,
    width_in_letters,
    write_svg,
)
from remoe.stages import SPARSE_STEPS

__all__ = ["final_losses", "looks", "loss_against", "save", "training_course", "training_losses", "write_svg"]

NAME_LENGTH = 24  # longest name, in letters, that leaves room for the loss
SETTLED_SHARE = 0.1  # sparsity per layer is averaged over this last part of a run


@mpl.rc_context(STYLE)
def training_course(
    runs: Mapping[str, Sequence[Mapping]],
    target: float | None = None,
    *,
    log_steps: bool = False,
    look: Mapping[str, Look] | None = None,
) -> Figure:
    """Sparsity S, lambda, both losses and the penalty during training (Fig. 3, 4).

    Args:
        runs: records of metrics.jsonl for each run.
        target: target sparsity, drawn as a line.
        log_steps: whether the step axis is logarithmic, which shows the first stages of a long run.
    """
    look = look or looks(runs)
    fig = new_figure(8.2, 4.6)
    axes = fig.subplots(2, 3)
    panels = {
        "Sparsity S": ("share of inactive pairs", lambda record: record["sparsity"]),
        "Coefficient λ": ("λ", lambda record: record["lambda"]),
        "Regulariser $L_{reg}$": ("per token, before λ", lambda record: record["reg_loss"]),
        "Penalty λ·$L_{reg}$": ("nats", lambda record: record["lambda"] * record["reg_loss"]),
        "Language model loss $L_{lm}$": ("nats per token", lambda record: record["lm_loss"]),
    }
    for ax, (title, (unit, value)) in zip(axes.flat, panels.items(), strict=False):
        for name, records in runs.items():
            steps = [record["step"] for record in records]
            values = [value(record) for record in records]
            ax.plot(steps, values, color=look[name].color, ls=look[name].linestyle, lw=1)
            start = _start_of_sparse_stage(records)
            if start is not None:
                ax.axvline(start, color=look[name].color, ls=":", lw=0.9)
        if title.startswith(("Coefficient", "Penalty")):
            ax.set_yscale("log")
            ax.yaxis.set_minor_locator(NullLocator())
        _step_axis(ax, log_steps)
        label(ax, x="step", y=unit, title=title)
    _sparsity_per_layer(axes[1, 2], runs, look)
    marks = [Line2D([], [], color=GREY, ls=":", lw=0.9, label="sparse stage begins")]
    if target is not None:
        for ax in (axes[0, 0], axes[1, 2]):
            ax.axhline(target, color=GREY, ls="--", lw=0.9, zorder=1)
        marks.append(Line2D([], [], color=GREY, ls="--", lw=0.9, label=f"target {target:g}"))
    lines = [Line2D([], [], color=look[name].color, ls=look[name].linestyle, label=plain(name)) for name in runs]
    handles = lines + marks
    columns = legend_columns((handle.get_label() for handle in handles), fig.get_figwidth())
    fig.legend(handles=handles, loc="outside upper center", ncols=columns)
    return fig


@mpl.rc_context(STYLE)
def training_losses(
    runs: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    window: int = 1,
    look: Mapping[str, Look] | None = None,
) -> Figure:
    """Training loss of several systems: the whole run, and an enlargement of its last third.

    Args:
        runs: steps, and the language model loss in nats per token at each.
        window: number of records in the moving mean that is drawn, at most a third of the run's; the left panel also
            shows the records themselves, faintly.
    """
    look = look or looks(runs)
    fig = new_figure(7.2, 3.2)
    axes = fig.subplots(1, 2, width_ratios=[1, 1.15])
    last = max(steps[-1] for steps, _ in runs.values())
    late = last * 2 / 3
    ends, seen, end = {}, [], late
    for name, (steps, losses) in runs.items():
        mean_steps, means = _moving_mean(steps, window), _moving_mean(losses, window)
        ends[name] = means[-1]
        seen += means[mean_steps >= late].tolist() or [means[-1]]
        end = max(end, mean_steps[-1])
        if window > 1:
            axes[0].plot(steps, losses, color=look[name].color, lw=0.6, alpha=0.18)
        for ax in axes:
            ax.plot(mean_steps, means, color=look[name].color, ls=look[name].linestyle, label=plain(name))
    margin = 0.06 * (max(seen) - min(seen)) or 0.01
    axes[1].set(xlim=(late, end if end > late else last), ylim=(min(seen) - margin, max(seen) + margin))
    label(axes[0], x="step", y="training loss (nats per token)", title="Whole run")
    label(axes[1], x="step", title="Last third")
    handles, _ = axes[1].get_legend_handles_labels()
    by_end = sorted(zip(handles, runs, strict=True), key=lambda pair: -ends[pair[1]])
    fig.legend(handles=[handle for handle, _ in by_end], loc="outside right center", title="highest to lowest")
    return fig


@mpl.rc_context(STYLE)
def loss_against(
    systems: Mapping[str, Mapping[float, Sequence[float]]],
    axis: str,
    *,
    look: Mapping[str, Look] | None = None,
) -> Figure:
    """Validation loss against the size of a model, or the number or granularity of its experts (Fig. 6).

    Args:
        systems: for each system and value of the axis, the losses of its seeds in nats per token. Points are means;
            bars are one standard deviation, if there are several seeds.
        axis: label of the values, e.g. "experts E"; their scale is logarithmic if all are positive.
    """
    look = look or looks(systems)
    outside = len(systems) > MAX_LEGEND
    fig = new_figure(6.4 if outside else 4.2, max(3.1, 0.4 + 0.17 * len(systems)))
    ax = fig.subplots()
    for name, points in systems.items():
        values = sorted(points)
        means = [fmean(points[value]) for value in values]
        deviations = [_deviation(points[value]) for value in values]
        color, marker, linestyle = look[name]
        ax.errorbar(
            values, means, deviations, color=color, marker=marker, ls=linestyle, ms=4, capsize=3, label=plain(name)
        )
    values = sorted({value for points in systems.values() for value in points})
    if values[0] > 0:
        ax.set_xscale("log")
        axis += " (log scale)"
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: quantity(value))
    label(ax, x=axis, y="validation loss (nats per token)")
    if outside:
        fig.legend(loc="outside right upper")
    else:
        ax.legend()
    return fig


@mpl.rc_context(STYLE)
def final_losses(systems: Mapping[str, Sequence[float]], *, look: Mapping[str, Look] | None = None) -> Figure:
    """Final validation loss of each system, best first: mean, standard deviation, and each seed.

    Args:
        systems: for each system, the losses of its seeds in nats per token.
    """
    look = look or looks(systems)
    longest = max(width_in_letters(plain(name)) for name in systems)
    fig = new_figure(5.4 + 0.06 * max(0, longest - NAME_LENGTH), 0.9 + 0.3 * len(systems))
    fig.get_layout_engine().set(rect=(0, 0, 0.96, 1))  # leaves room for text to the right of the axes
    ax = fig.subplots()
    order = sorted(systems, key=lambda name: fmean(systems[name]))
    for row, name in enumerate(order):
        losses, (color, marker, linestyle) = systems[name], look[name]
        mean, deviation = fmean(losses), _deviation(losses)
        inside = color if linestyle == "-" else "white"  # tells systems that share a colour apart
        ax.errorbar(mean, row, xerr=deviation, fmt=marker, color=color, mfc=inside, capsize=3, ms=6)
        ax.plot(losses, [row + 0.22] * len(losses), ls="", marker="|", ms=4.5, color=color, alpha=0.8)
        text = f"{mean:.3f}" + (f" ± {deviation:.3f}" if len(losses) > 1 else "")
        ax.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=7.5, color="#222222")
    ax.set_yticks(range(len(order)), [*map(plain, order)])
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.margins(x=0.08)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0, labelsize=8)
    label(ax, x="validation loss (nats per token); bar: one standard deviation, ticks: seeds")
    return fig


def _sparsity_per_layer(ax: Axes, runs: Mapping[str, Sequence[Mapping]], look: Mapping[str, Look]) -> None:
    layers = 1
    for name, records in runs.items():
        from_step = (1 - SETTLED_SHARE) * records[-1]["step"]
        late = [record["sparsity_per_layer"] for record in records if record["step"] > from_step]
        means = np.mean(late, axis=0)
        color, marker, linestyle = look[name]
        ax.plot(range(len(means)), means, color=color, ls=linestyle, marker=marker)
        layers = max(layers, len(means))
    number_axis(ax, "x", layers)
    label(ax, x="layer", y="share of inactive pairs", title=f"S per layer, last {SETTLED_SHARE:.0%} of the steps")


def _start_of_sparse_stage(records: Sequence[Mapping]) -> int | None:
    """First step of the final sparse stage; None if the run is sparse from the start or at the end is not."""
    begin = None
    for record in records:
        if record["stage"] != "sparse":
            begin = None
        elif begin is None:
            begin = record["step"]
        elif record["step"] >= begin + SPARSE_STEPS - 1:
            break
    return None if records[0]["stage"] == "sparse" else begin


def _step_axis(ax: Axes, log_steps: bool) -> None:
    if log_steps:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda step, _: f"{step:g}")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))


def _moving_mean(values: Sequence[float], window: int) -> np.ndarray:
    window = min(window, len(values) // 3)
    return np.convolve(values, np.full(window, 1 / window), mode="valid") if window > 1 else np.asarray(values)


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; for a single value NaN, which draws no bar."""
    return stdev(values) if len(values) > 1 else math.nan
