"""The dial of a page: loss and speed of a model at several gate thresholds and caps."""

from typing import Any

from remoe.lab.analysis.dial import DialPoint, measure_dial
from remoe.lab.analysis.source import Source
from remoe.lab.machine import machine


def dial_of(source: Source, domains: list[str], max_tokens: int) -> dict[str, Any]:
    """What a page shows of `measure_dial`, whose arguments these are.

    Returns:
        tokens; machine, its name; and threshold and cap, lists of the same length each: setting, loss, active, speed.
    """
    found, facts = measure_dial(source, domains, max_tokens), machine(source.model.device)
    name = facts.get("gpu") or f"{facts['cpu']}, threads: {facts['threads']}"
    return {
        "tokens": found.tokens,
        "machine": name,
        "threshold": _columns(found.threshold),
        "cap": _columns(found.cap),
    }


def _columns(points: list[DialPoint]) -> dict[str, list[float]]:
    return {
        "setting": [point.setting for point in points],
        "loss": [point.loss for point in points],
        "active": [point.active for point in points],
        "speed": [point.tokens_per_second for point in points],
    }
