"""Comparing two files of `remoe bench`: the ratio of each measured time, its spread, and what differs between them."""

import json
from dataclasses import dataclass
from pathlib import Path

from remoe.errors import ConfigError

_SIZES = ("T", "D", "F", "E", "k")
_SIGNIFICANT = 2  # spreads: a change within so many may be chance
_RATES = {
    "default_gemm_flops": ("large product by torch.mm", 1e9, "GFLOP/s"),
    "onednn_gemm_flops": ("large product by oneDNN", 1e9, "GFLOP/s"),
    "gemm_flops": ("fastest large product", 1e9, "GFLOP/s"),
    "read_bytes": ("memory reads", 1e9, "GB/s"),
}


@dataclass(frozen=True)
class Change:
    """One measured time in two files.

    Attributes:
        case: sizes of the layer, "T, D, F, E, k", with T the batch for `generate`; "" for a training step.
        name: implementation.
        before: milliseconds in the first file.
        after: milliseconds in the second.
        spread: the larger of both spreads over the median; None where a file does not say it.
    """

    case: str
    name: str
    before: float
    after: float
    spread: float | None

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "within spread"; "" where no spread is known."""
        if self.spread is None:
            return ""
        if abs(self.ratio - 1) <= _SIGNIFICANT * self.spread:
            return "within spread"
        return "slower" if self.ratio > 1 else "faster"


@dataclass(frozen=True)
class Difference:
    """Two files of measurements side by side.

    Attributes:
        changes: of the times that both files have.
        conditions: one line for each fact of machine, versions, options and rates that differs.
        only: "case, name" of the times that one file lacks, with the file that has them.
    """

    changes: list[Change]
    conditions: list[str]
    only: list[str]


def compare_files(before: Path, after: Path) -> Difference:
    """Compares two JSON files that `remoe bench` wrote.

    Raises:
        ConfigError: if a file is not one of those, or if the files have no time in common.
    """
    a, b = _read(before), _read(after)
    try:
        times_a, times_b = _times(a), _times(b)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{before} or {after} is not as `remoe bench --out` writes it: {error!r}") from error
    both = [key for key in times_a if key in times_b]
    if not both:
        raise ConfigError(f"{before} and {after} have no measurement in common")
    changes = []
    for case, name in both:
        (ms_a, spread_a), (ms_b, spread_b) = times_a[case, name], times_b[case, name]
        spread = None if spread_a is None or spread_b is None else max(spread_a, spread_b)
        changes.append(Change(case, name, ms_a, ms_b, spread))
    only = [
        f"only in {path}: {', '.join(part for part in key if part)}"
        for path, mine, other in ((before, times_a, times_b), (after, times_b, times_a))
        for key in mine
        if key not in other
    ]
    return Difference(changes, _conditions(a, b), only)


def _read(path: Path) -> dict:
    if path.exists() and not path.is_file():  # reading a pipe would wait
        raise ConfigError(f"{path} is not a file")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a JSON file") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not content["rows"]:
        raise ConfigError(f"{path} is not a file of measurements: `remoe bench ... --out FILE` writes those")
    return content


def _times(content: dict) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Milliseconds and spread by case and implementation."""
    times = {}
    for row in content["rows"]:
        if "milliseconds" in row:
            case = ", ".join(str(row[size]) for size in _SIZES)
            for name, ms in row["milliseconds"].items():
                times[case, name] = (_positive(ms), row.get("spread", {}).get(name))
        else:
            times["", row["name"]] = (_positive(row["ms_per_step"]), None)
    return times


def _positive(milliseconds: float) -> float:
    if not 0 < milliseconds < float("inf"):
        raise ValueError(f"a time of {milliseconds} ms")
    return milliseconds


def _conditions(a: dict, b: dict) -> list[str]:
    facts_a, facts_b = (
        {**x.get("machine", {}), **x.get("work", {}), **{k: x.get(k) for k in ("dtype", "repetitions")}} for x in (a, b)
    )
    names = [*facts_a, *(name for name in facts_b if name not in facts_a)]
    lines = [
        f"{name}: {facts_a.get(name)} before, {facts_b.get(name)} after"
        for name in names
        if facts_a.get(name) != facts_b.get(name)
    ]
    rates_a, rates_b = a.get("roofline", {}), b.get("roofline", {})
    for name, (words, unit, unit_name) in _RATES.items():
        if rates_a.get(name) and rates_b.get(name):
            before, after = rates_a[name] / unit, rates_b[name] / unit
            lines.append(f"{words}: {before:,.1f} before, {after:,.1f} {unit_name} after ({after / before:.2f} times)")
    return lines
