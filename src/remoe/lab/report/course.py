"""The training of a page: series over the steps, thinned so that no spike is lost, and the load of each expert.

Legend: S records of steps, N columns, L layers, E experts.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from remoe.lab.analysis.measures import inactive_below
from remoe.lab.report.packed import exact, short, whole_numbers
from remoe.lab.thinning import kept_points

GIB = 2**30
COLUMNS = 200  # of a map, at least half as many for a longer run
SINGLE = ("lm_loss", "reg_loss", "lambda", "sparsity", "grad_norm", "lr", "tokens_per_second", "flip_rate")


def course_of(records: Iterable[dict[str, Any]], experts: int, k: int, target: float | None) -> dict[str, Any] | None:
    """What the records of a run show, read once and one at a time.

    Args:
        records: of metrics.jsonl, by increasing step.
        experts: E.
        k: target number of experts per token.
        target: target sparsity; None for a router that is not steered.

    Returns:
        target; stages, as [first step, last step, name]; plots, by name: step (n,) and, for each of `names`, values
        (n,); and load, the share of the tokens of each expert: step (N,), the first of each column, and share
        (L, E, N), means over its records. None without records. A value that a record does not have is NaN.
    """
    steps: list[int] = []
    single: dict[str, list[float]] = {name: [] for name in (*SINGLE, "memory", "penalty", "inactive")}
    layers: list[list[float]] = []
    load, stages = _Load(), []
    for record in records:
        steps.append(record["step"])
        for name in SINGLE:
            single[name].append(record.get(name, math.nan))
        single["memory"].append(record.get("memory_bytes", math.nan) / GIB)
        single["penalty"].append(record.get("lambda", math.nan) * record.get("reg_loss", math.nan))
        load_LE = np.asarray(record.get("load_per_expert", []), np.float32)
        known = load_LE.ndim == 2 and load_LE.size > 0
        single["inactive"].append(float((load_LE < inactive_below(experts, k)).sum()) if known else math.nan)
        if known:
            load.add(record["step"], load_LE)
        layers.append(record.get("sparsity_per_layer") or [])
        _extend(stages, record)
    if not steps:
        return None
    plots = {name: _plot(steps, {name: values}) for name, values in single.items() if not all(map(math.isnan, values))}
    if width := len(layers[-1]):
        rows = np.array([row if len(row) == width else [math.nan] * width for row in layers])
        plots["sparsity_per_layer"] = _plot(steps, {f"layer {layer}": rows[:, layer] for layer in range(width)})
    return {"target": target, "stages": stages if target is not None else [], "plots": plots, "load": load.section()}


def _plot(steps: list[int], series: dict[str, Any]) -> dict[str, Any]:
    values_NS, step_S = np.array([*series.values()], np.float64), np.array(steps)
    known_S = ~np.isnan(values_NS).all(axis=0)  # such as flips, which not every record has
    values_NS, step_S = values_NS[:, known_S], step_S[known_S]
    kept = kept_points(values_NS)
    return {"step": whole_numbers(step_S[kept]), "names": [*series], "values": exact(values_NS[:, kept])}


def _extend(stages: list[list[Any]], record: dict[str, Any]) -> None:
    name = record.get("stage")
    if stages and stages[-1][2] == name:
        stages[-1][1] = record["step"]
    elif name is not None:
        stages.append([record["step"], record["step"], name])


class _Load:
    """Means of consecutive records; when there are too many columns, each two become one."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sums: list[np.ndarray] = []
        self.width, self.filled = 1, 1  # records in a column, and in the last one

    def add(self, step: int, load_LE: np.ndarray) -> None:
        if self.sums and self.filled < self.width:
            self.sums[-1] += load_LE
            self.filled += 1
            return
        if len(self.sums) == COLUMNS:
            self.sums = [one + other for one, other in zip(self.sums[::2], self.sums[1::2], strict=True)]
            self.steps, self.width = self.steps[::2], 2 * self.width
        self.steps.append(step)
        self.sums.append(load_LE.astype(np.float64))
        self.filled = 1

    def section(self) -> dict[str, Any] | None:
        if not self.sums:
            return None
        records = [self.width] * (len(self.sums) - 1) + [self.filled]
        share = np.stack([total / count for total, count in zip(self.sums, records, strict=True)], axis=-1)
        return {"step": whole_numbers(self.steps), "share": short(share)}
