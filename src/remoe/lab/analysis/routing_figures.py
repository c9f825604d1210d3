"""Figures of routing: which tokens the experts of a trained model take, and how fast that changes.

Figure numbers refer to ReMoE, arXiv 2412.14711. Shares and activities come from `measures`; every function accepts
lists, arrays or tensors of them.

Legend: L layers, E experts, C domains, U distinct token ids.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from remoe.lab.analysis.measures import inactive_below, rank_correlation
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
)

MAX_BARS_ACROSS = 100
MAX_BARS, MAX_BAR_DOMAINS = 200, 10  # in the panel of a layer; domains have a colour each
MAX_DOMAIN_NAMES = 60  # next to a map
MAX_COLUMNS = 400  # in a map over steps


@mpl.rc_context(STYLE)
def active_against_frequency(
    runs: Mapping[str, tuple[ArrayLike, ArrayLike]], *, look: Mapping[str, Look] | None = None
) -> Figure:
    """Mean active experts of each token id against the number of its occurrences (Fig. 7), one panel per run.

    Args:
        runs: counts (U,) and mean active experts (U,) of the token ids, as `measures.active_by_token` returns them.
            Dots are ids; the line is the mean over ids whose counts are in the same octave.
    """
    look = look or looks(runs)
    fig = new_figure(0.6 + 2.9 * len(runs), 2.9)
    axes = fig.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for ax, (name, (count_U, active_U)) in zip(axes, runs.items(), strict=True):
        count_U, active_U = np.asarray(count_U), np.asarray(active_U)
        color = look[name].color
        ax.scatter(count_U, active_U, s=5, lw=0, color=color, alpha=0.25, rasterized=True)
        ax.plot(*_octave_means(count_U, active_U), color="#111111", marker="o", ms=3.5, label="mean over ids")
        mean = np.average(active_U, weights=count_U)
        ax.axhline(mean, color=GREY, ls="--", lw=0.9, label="mean over tokens")
        correlation = rank_correlation(torch.as_tensor(active_U), torch.as_tensor(count_U))
        known = "undefined" if math.isnan(correlation) else f"{correlation:+.2f}".replace("-", "−")
        ax.annotate(f"rank correlation {known}", (0.97, 0.97), xycoords="axes fraction", ha="right", va="top")
        ax.set_xscale("log")
        label(ax, x="occurrences of the token id (log scale)", title=plain(name))
    axes[0].set_ylim(0, 1.05 * max(np.asarray(active_U).max() for _, active_U in runs.values()) or 1)
    axes[0].set_ylabel("active experts per layer")
    handles, _ = axes[0].get_legend_handles_labels()
    fig.legend(handles=handles, loc="outside upper right", ncols=2)
    return fig


@mpl.rc_context(STYLE)
def routed_share_maps(runs: Mapping[str, ArrayLike], k: Mapping[str, int]) -> Figure:
    """Share of the tokens that each expert of each layer takes (Fig. 8), one map per run, with sparsity per layer.

    Args:
        runs: (L, E) shares in 0..1; runs may differ in L and E.
        k: target number of active experts per token of each run, which determines the experts marked as inactive.
    """
    shares = {name: np.asarray(share_LE) for name, share_LE in runs.items()}
    experts = [share_LE.shape[1] for share_LE in shares.values()]
    widths = [width for E in experts for width in (max(1.6, min(4.5, 0.22 * E)), 0.6)]
    layers = max(len(share_LE) for share_LE in shares.values())
    fig = new_figure(1.2 + sum(widths) + 0.35 * len(runs), 1.5 + 0.22 * max(layers, 4))
    axes = fig.subplots(1, 2 * len(runs), width_ratios=widths, squeeze=False)[0]
    highest = max(share_LE.max() for share_LE in shares.values()) or 1
    for index, (name, share_LE) in enumerate(shares.items()):
        ax, side = axes[2 * index], axes[2 * index + 1]
        # A square root, so that a few busy experts do not make all others look equally dark.
        norm = PowerNorm(0.5, vmin=0, vmax=highest)
        image = ax.imshow(share_LE, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        layer, expert = np.nonzero(share_LE < inactive_below(share_LE.shape[1], k[name]))
        cell_width = 72 * widths[2 * index] / share_LE.shape[1]  # points
        ax.scatter(expert, layer, marker="x", s=min(14, (cell_width / 3) ** 2), lw=0.8, color="white")
        ax.grid(visible=False)
        number_axis(ax, "x", share_LE.shape[1])
        number_axis(ax, "y", len(share_LE))
        label(ax, x="expert", y="" if index else "layer", title=plain(name))
        side.barh(range(len(share_LE)), 1 - share_LE.mean(axis=1), height=0.7, color="#999999")
        side.set(xlim=(0, 1), ylim=ax.get_ylim(), xticks=[0, 1])
        side.tick_params(axis="y", left=False, labelleft=False)
        label(side, x="sparsity")
    bar = fig.colorbar(image, ax=axes.tolist(), pad=0.01, aspect=15)
    bar.set_label("share of tokens\n(×: under 1/8 of the target)")
    return fig


@mpl.rc_context(STYLE)
def routed_share_by_domain(
    share_CLE: ArrayLike, domains: Sequence[str], k: int, *, look: Mapping[str, Look] | None = None
) -> Figure:
    """Share of each domain's tokens that each expert takes, one panel per layer, and active experts (Fig. 9, 12).

    Draws bars, or maps if there would be too many bars.

    Args:
        share_CLE: (C, L, E) shares in 0..1.
        domains: (C,) names.
        k: target number of active experts per token, which determines the share below which an expert is inactive.
        look: colours and markers of the domains.
    """
    share_CLE = np.asarray(share_CLE)
    C, L, E = share_CLE.shape
    if C > MAX_BAR_DOMAINS or C * E > MAX_BARS:
        return _share_maps_by_domain(share_CLE, domains)
    look = look or looks(domains)
    rows, columns = _grid(L, MAX_BARS_ACROSS // (C * E))
    fig = new_figure(7.6, 0.8 + 1.35 * rows + 2)
    upper, lower = fig.subfigures(2, 1, height_ratios=[0.8 + 1.35 * rows, 2])
    axes = upper.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    width = 0.8 / C
    for layer, ax in enumerate(axes.flat[:L]):
        for index, domain in enumerate(domains):
            offset = (index - (C - 1) / 2) * width
            bars = np.arange(E) + offset, share_CLE[index, layer]
            ax.bar(*bars, width, color=look[domain].color, label=plain(domain))
        ax.axhline(inactive_below(E, k), color=GREY, ls=":", lw=0.9)
        ax.grid(axis="x", visible=False)
        number_axis(ax, "x", E)
        ax.set_xlim(-0.6, E - 0.4)
        label(ax, title=f"layer {layer}")
    _label_lowest(axes, L, "expert")
    upper.supylabel("share of the domain's tokens\n(dotted: 1/8 of the target)", fontsize=8)
    handles, _ = axes[0, 0].get_legend_handles_labels()
    upper.legend(handles=handles, loc="outside upper center", ncols=legend_columns(domains, fig.get_figwidth()))
    _active_by_domain(lower.subplots(), share_CLE.sum(axis=2), domains, look)
    return fig


def _grid(panels: int, across: int) -> tuple[int, int]:
    """Rows and columns: at most three panels, and at most `across`, in a row; rows as even as possible."""
    rows = -(-panels // max(1, min(3, across)))
    return rows, -(-panels // rows)


def _share_maps_by_domain(share_CLE: np.ndarray, domains: Sequence[str]) -> Figure:
    """The same as maps with one row per domain; the last map shows active experts, one column per layer."""
    C, L, E = share_CLE.shape
    rows, columns = _grid(L, MAX_BARS_ACROSS // E)
    height = max(1.2, min(6.0, 0.4 + 0.12 * C))
    fig = new_figure(7.6, 0.5 + height * (rows + 1))
    upper, lower = fig.subfigures(2, 1, height_ratios=[rows, 1])
    axes = upper.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shares = PowerNorm(0.5, vmin=0, vmax=np.nanmax(share_CLE) or 1)
    options = {"cmap": "viridis", "aspect": "auto", "interpolation": "nearest"}
    for layer, ax in enumerate(axes.flat[:L]):
        image = ax.imshow(share_CLE[:, layer], norm=shares, **options)
        number_axis(ax, "x", E)
        label(ax, title=f"layer {layer}")
    _label_lowest(axes, L, "expert")
    upper.colorbar(image, ax=axes.ravel().tolist(), pad=0.01).set_label("share of the domain's tokens")
    active_CL, last = share_CLE.sum(axis=2), lower.subplots()
    image = last.imshow(active_CL, vmin=0, vmax=np.nanmax(active_CL) or 1, **options)
    number_axis(last, "x", L)
    label(last, x="layer", title="Mean active experts")
    lower.colorbar(image, ax=last, pad=0.01).set_label("active experts per token")
    named = range(0, C, -(-C // MAX_DOMAIN_NAMES))
    for ax in (*axes[:, 0], last):
        ax.set_yticks(named, [plain(domains[index]) for index in named], fontsize=6)
    for ax in (*axes.flat, last):
        ax.grid(visible=False)
    return fig


@mpl.rc_context(STYLE)
def load_course(steps: Sequence[int], load_SLE: ArrayLike, k: int) -> Figure:
    """Load of each expert during training: one map per layer, one row per expert.

    Args:
        steps: (S,) steps of the records.
        load_SLE: (S, L, E) share of the tokens that each expert takes at each step. All columns of a map span the same
            number of steps; a column shows the mean of its records, or the next record if it has none.
        k: target number of active experts per token; the colour scale ends at four times the target load.
    """
    load_SLE = np.asarray(load_SLE, dtype=float)
    S, L, E = load_SLE.shape
    ends = np.linspace(steps[0] - 0.5, steps[-1] + 0.5, min(S, MAX_COLUMNS) + 1)[1:]
    after = np.searchsorted(steps, ends)
    load_LEN = np.stack(
        [load_SLE[min(low, S - 1) : max(low + 1, high)].mean(axis=0) for low, high in pairwise([0, *after])], axis=-1
    )
    columns = max(1, min(2, L))
    rows = -(-L // columns)
    fig = new_figure(7.6, 0.5 + rows * min(2.4, 0.6 + 0.07 * E))
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = PowerNorm(0.5, vmin=0, vmax=min(1, 4 * k / E))
    for layer, ax in enumerate(axes.flat[:L]):
        extent = (steps[0] - 0.5, steps[-1] + 0.5, E - 0.5, -0.5)
        image = ax.imshow(
            load_LEN[layer], cmap="viridis", norm=norm, aspect="auto", interpolation="nearest", extent=extent
        )
        ax.grid(visible=False)
        number_axis(ax, "y", E)
        label(ax, title=f"layer {layer}")
    _label_lowest(axes, L, "step")
    for ax in axes[:, 0]:
        ax.set_ylabel("expert")
    bar = fig.colorbar(image, ax=axes.ravel().tolist(), pad=0.01, aspect=25, extend="max")
    bar.set_label("share of tokens")
    return fig


@mpl.rc_context(STYLE)
def flips(
    runs: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    num_experts: Mapping[str, int],
    *,
    look: Mapping[str, Look] | None = None,
) -> Figure:
    """How fast routing changes during training: flip rate by step, and flip count of each system (Fig. 10).

    Args:
        runs: steps, and the flip rate at each.
        num_experts: E of each run; the flip count is E times the mean flip rate of the run.
    """
    look = look or looks(runs)
    fig = new_figure(7.4, max(2.7, 0.9 + 0.17 * len(runs)))
    left, right = fig.subplots(1, 2, width_ratios=[1.5, 1])
    for row, (name, (steps, rates)) in enumerate(runs.items()):
        color, marker, linestyle = look[name]
        sparse = max(1, len(steps) // 10)
        left.plot(steps, rates, color=color, ls=linestyle, marker=marker, markevery=sparse, label=plain(name))
        count = num_experts[name] * float(np.mean(rates))
        right.barh(row, count, height=0.62, color=color)
        right.annotate(f"{count:.3g}", (count, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    left.set_ylim(bottom=0)
    if len(runs) <= MAX_LEGEND:
        left.legend()
    else:
        fig.legend(
            *left.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=legend_columns(runs, fig.get_figwidth()),
        )
    label(left, x="step", y="flip rate (share of pairs)", title="Routing that changes in one step")
    right.set_yticks(range(len(runs)), [*map(plain, runs)])
    right.invert_yaxis()
    right.margins(x=0.22)
    right.grid(axis="y", visible=False)
    right.tick_params(axis="y", length=0, labelsize=8)
    label(right, x="experts per token and layer", title="Mean flip count")
    return fig


def _label_lowest(axes: np.ndarray, panels: int, x: str) -> None:
    """Labels the horizontal axis of the lowest panel of each column, and hides unused axes."""
    for ax in axes.flat[panels:]:
        ax.set_visible(False)
    for column in axes.T:
        lowest = [ax for ax in column if ax.get_visible()][-1]
        lowest.set_xlabel(x)
        lowest.tick_params(labelbottom=True)


def _active_by_domain(ax: Axes, active_CL: np.ndarray, domains: Sequence[str], look: Mapping[str, Look]) -> None:
    for domain, active_L in zip(domains, active_CL, strict=True):
        color, marker, linestyle = look[domain]
        ax.plot(range(len(active_L)), active_L, color=color, marker=marker, ls=linestyle, label=plain(domain))
    number_axis(ax, "x", active_CL.shape[1])
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_ylim(0, 1.1 * np.nanmax(active_CL) or 1)
    label(ax, x="layer", y="active experts per token", title="Mean active experts")


def _octave_means(count_U: np.ndarray, active_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each octave of counts: the geometric mean of the ids' counts, and their mean active experts."""
    octave_U = np.floor(np.log2(count_U))
    groups = [octave_U == octave for octave in np.unique(octave_U)]
    counts = np.array([np.exp(np.log(count_U[group]).mean()) for group in groups])
    return counts, np.array([active_U[group].mean() for group in groups])
