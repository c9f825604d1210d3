"""Timing of functions that take turns, so that a slow moment of the machine affects all of them."""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 2
HEAD_START = 20_000_000  # cycles of the GPU, about ten milliseconds


def comparison(seconds: dict[str, list[float]], dense: tuple[str, ...]) -> dict[str, object]:
    """What a table shows of the times of several implementations.

    Args:
        seconds: of each round, by implementation.
        dense: names of those that are dense layers; "dense" is among them.

    Returns:
        By implementation: median milliseconds, their spread (the distance of the quartiles, over the median), and the
        ratios of the median to that of "dense" and to that of the fastest dense layer. Also the name of the latter.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(dense, key=medians.__getitem__)
    return {
        "milliseconds": {name: 1e3 * median for name, median in medians.items()},
        "spread": {name: quartile_distance(values) / medians[name] for name, values in seconds.items()},
        "fastest_dense": fastest,
        "ratio_to_fastest_dense": {name: median / medians[fastest] for name, median in medians.items()},
        "ratio_to_dense": {name: median / medians["dense"] for name, median in medians.items()},
    }


def quartile_distance(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def median_seconds(functions: dict[str, Callable], device: torch.device, repetitions: int) -> dict[str, float]:
    """Median of `round_seconds`, by function."""
    times = round_seconds(functions, device, repetitions)
    return {name: statistics.median(values) for name, values in times.items()}


def round_seconds(
    functions: dict[str, Callable], device: torch.device, repetitions: int, *, ahead: bool = True
) -> dict[str, list[float]]:
    """Time of each function in each of `repetitions` rounds; in every round each one runs once.

    Args:
        functions: by name.
        device: where they run.
        repetitions: number of rounds, after the WARM_UP rounds that are not counted.
        ahead: on CUDA, whether the host gets a head start of ten milliseconds, as in a model whose kernels take longer
            than their launches; only functions with a host sync then wait for the host. Without it, a function of small
            kernels takes as long as the host needs to launch them, which `host_seconds` measures.
    """
    if device.type == "cuda":
        return _round_seconds_cuda(functions, repetitions, ahead)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(WARM_UP + repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_ >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def _round_seconds_cuda(functions: dict[str, Callable], repetitions: int, ahead: bool) -> dict[str, list[float]]:
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than the L2 cache
    events: dict[str, list[tuple]] = {name: [] for name in functions}
    for round_ in range(WARM_UP + repetitions):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()  # so that no function depends on the one before it
            flush.zero_()
            if ahead:
                torch.cuda._sleep(HEAD_START)
            start.record()
            function()
            end.record()
            if round_ >= WARM_UP:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def host_seconds(functions: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """Median time until each function returns on CUDA: that of its launches and host syncs."""
    medians = {}
    for name, function in functions.items():
        times = []
        for _ in range(repetitions):
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        medians[name] = statistics.median(times)
    torch.cuda.synchronize()
    return medians


def peak_bytes(function: Callable, device: torch.device) -> int:
    """Peak bytes that `function` allocates, without those of blocks that existed before.

    Args:
        function: called once, on CUDA twice; its method `clear`, if any, frees what an earlier call has left.
        device: where it runs.
    """
    if device.type == "cuda":
        function()
        getattr(function, "clear", lambda: None)()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = least = peak = 0
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        least = min(least, held)
        peak = max(peak, held - least)
    return peak
