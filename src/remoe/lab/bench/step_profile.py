"""Where the time of a training step goes: the share of each kind of work, from the self times of PyTorch's profiler.

The functions of SCOPES are marked while the profiler runs. An operator belongs to the innermost marked function around
it, an operator of the backward pass to the function in which autograd recorded it. Apart from these are, wherever they
are called, matrix products and the attention's core, which is PyTorch's operator with all that it calls. Python's time
counts where it is spent. The experts' C++ passes time their products themselves; these count divided by the number of
threads, so that "experts, rest" includes waiting.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from remoe.errors import ConfigError
from remoe.experts.cpu.build import time_products
from remoe.lab.bench.train_step import (
    CONTESTANTS,
    REMOE,
    TrainStepOptions,
    check_options,
    train_remoe,
    training,
    warm_up,
)
from remoe.lab.machine import keep_freed_memory

EXPERT_PRODUCTS, PRODUCTS, ATTENTION = "experts' products", "other products", "attention core"
EXPERTS, NORMS, ROTARY, ROUTERS = "experts, rest", "norms", "rotary", "routers"
LOSS, CLIPPING, OPTIMISER, STATISTICS = "loss", "clipping", "optimiser", "statistics and records"
REST = "rest"  # residual connections, copies, sums of gradients, embedding, Python
CATEGORIES = (
    EXPERT_PRODUCTS, PRODUCTS, ATTENTION, EXPERTS, NORMS, ROTARY, ROUTERS, LOSS, CLIPPING, OPTIMISER, STATISTICS, REST,
)  # fmt: skip
NEEDED = (EXPERT_PRODUCTS, PRODUCTS, ATTENTION)
DEFAULT = "remoe relu"
LARGEST = 3  # operators of each category to show
# Module, class or function, method: what it does.
SCOPES = {
    ("remoe.experts.module", "Experts", "forward"): EXPERTS,
    ("remoe.models.norm", "RMSNorm", "forward"): NORMS,
    ("remoe.models.decoder", "residual_norm", ""): NORMS,
    ("remoe.models.rotary", "RotaryEmbedding", "forward"): ROTARY,
    ("remoe.models.attention", "rotate", ""): ROTARY,
    ("remoe.models.attention", "rotate_packed", ""): ROTARY,
    ("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb", ""): ROTARY,
    ("transformers.models.qwen3.modeling_qwen3", "apply_rotary_pos_emb", ""): ROTARY,
    ("remoe.routing.base", "Router", "__call__"): ROUTERS,
    ("remoe.models.modeling_remoe", "linear_cross_entropy", ""): LOSS,
    ("remoe.models.modeling_remoe", "shifted_targets", ""): LOSS,
    ("remoe.lab.training.ranks", "Ranks", "clip"): CLIPPING,
    ("remoe.sparsity", "SparsityController", "observe"): STATISTICS,
    ("remoe.sparsity", "SparsityController", "regularizer"): STATISTICS,
    ("remoe.sparsity", "SparsityController", "loss_terms"): STATISTICS,
    ("remoe.sparsity", "SparsityController", "update"): STATISTICS,
    ("remoe.lab.training.metrics", "MetricsWriter", "write"): STATISTICS,
    ("remoe.lab.training.progress", "ProgressLine", "show"): STATISTICS,
}
MARK = "category: "
OF_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
BACKWARD_NODE = "autograd::engine::evaluate_function"


@dataclass
class StepProfile:
    """The time of a contestant's steps, by kind of work.

    Attributes:
        rows: for each of CATEGORIES that took any time: name, ms_per_step, share of the step, and `operators`, its
            largest with their ms per step.
        details: options, contestant, ms_per_step, share_of_rest (all but products and the attention's core), threads,
            and sparsity of the last step.
    """

    rows: list[dict[str, Any]]
    details: dict[str, Any]


def profile_step(options: TrainStepOptions) -> StepProfile:
    """Trains one contestant in this process until it has warmed up, and profiles `steps` steps.

    Raises:
        ConfigError: unless the options name one contestant of ours, without torch.compile.
        DataError: when the data cannot be read.
    """
    check_options(options)
    if len(options.contestants) != 1 or CONTESTANTS[options.contestants[0]][0] != REMOE:
        ours = ", ".join(repr(name) for name, what in CONTESTANTS.items() if what[0] == REMOE)
        raise ConfigError(f"--profile takes one contestant, of {ours}")
    (contestant,) = options.contestants
    config, dataset = training(options)
    if config.compile:
        raise ConfigError("--profile shows steps without --compile")
    config.device = "cpu"
    keep_freed_memory()
    profiler = _Profiler(warm_up(CONTESTANTS[contestant], options), options.steps)
    with tempfile.TemporaryDirectory() as folder, suppress(_Finished):
        train_remoe(CONTESTANTS[contestant][1], config, dataset, Path(folder), profiler, options.biased)
    seconds, operators = times(profiler.events)
    products = min(profiler.product_seconds / torch.get_num_threads(), seconds[EXPERTS])
    seconds[EXPERTS] -= products
    seconds[EXPERT_PRODUCTS] += products
    operators[EXPERTS] = {}  # mainly the two passes, whose products are not apart
    total = sum(seconds.values())
    rows: list[dict[str, Any]] = []
    for category in CATEGORIES:
        largest = sorted(operators[category].items(), key=lambda item: -item[1])[:LARGEST]
        row = {
            "name": category,
            "ms_per_step": 1e3 * seconds[category] / options.steps,
            "share": seconds[category] / total,
            "operators": {name: 1e3 * time / options.steps for name, time in largest},
        }
        if seconds[category]:
            rows.append(row)
    details = {
        "options": asdict(options) | {"data": dataset.path.name},
        "contestant": contestant,
        "ms_per_step": 1e3 * total / options.steps,
        "share_of_rest": sum(row["share"] for row in rows if row["name"] not in NEEDED),
        "threads": torch.get_num_threads(),
        "sparsity": profiler.sparsity,
    }
    return StepProfile(rows, details)


class _Finished(Exception):
    """All steps are profiled."""


class _Profiler:
    """Called between the steps of a training loop: profiles some of them, then ends the loop."""

    def __init__(self, start: int, steps: int) -> None:
        self.events: list[FunctionEvent] = []
        self.product_seconds = 0.0
        self.sparsity: float | None = None
        self._stack = ExitStack()
        self._start, self._end, self._done = start, start + steps, 0

    def __call__(self, loss: float | None, sparsity: float | None) -> None:
        self._done += 1
        if self._done == self._start:
            self._profile = self._stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
            self._stack.enter_context(marked_scopes())
            self._stack.enter_context(record_function(MARK + REST))  # all that is in no other scope, Python's time too
            time_products(True)
        elif self._done == self._end:
            self.product_seconds, self.sparsity = time_products(False), sparsity
            self._stack.close()
            self.events = self._profile.events()
            raise _Finished


@contextmanager
def marked_scopes() -> Iterator[None]:
    """Context in which the functions of SCOPES show in profiles by the names of their categories."""
    with ExitStack() as stack:
        for (module, name, method), category in SCOPES.items():
            owner = import_module(module)
            if method:
                owner, name = getattr(owner, name), method
            # A method may be inherited: taking the mark away must not leave a copy behind.
            own, function = name in vars(owner), getattr(owner, name)
            setattr(owner, name, _marked(function, category))
            stack.callback(*((setattr, owner, name, function) if own else (delattr, owner, name)))
        yield


def _marked(function: Callable, category: str) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with record_function(MARK + category):
            return function(*args, **kwargs)

    return call


def times(events: list[FunctionEvent]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds of each category, and of each category's operators by name."""
    recorded: dict[int, str] = {}  # by number of a node of the graph
    kinds: dict[int, str] = {}  # by event
    seconds, operators = dict.fromkeys(CATEGORIES, 0.0), defaultdict(lambda: defaultdict(float))
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):  # callers first
        above = kinds.get(event.cpu_parent.id, REST) if event.cpu_parent is not None else REST
        kind = _category(event, above, recorded)
        kinds[event.id] = kind
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD_NODE) and event.scope != 1:
            recorded[event.sequence_nr] = kind  # the last operator with a number is the one whose node has it
        seconds[kind] += event.self_cpu_time_total / 1e6
        operators[kind][event.name] += event.self_cpu_time_total / 1e6
    return seconds, operators


def _category(event: FunctionEvent, above: str, recorded: dict[int, str]) -> str:
    name = event.name
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    if name.startswith("Optimizer."):
        return OPTIMISER
    if name in OF_PRODUCTS:
        return EXPERT_PRODUCTS if above == EXPERTS else PRODUCTS
    if "scaled_dot_product" in name:
        return ATTENTION
    if name.startswith(BACKWARD_NODE):
        kind = recorded.get(event.sequence_nr, REST)
        return {EXPERT_PRODUCTS: EXPERTS, PRODUCTS: REST}.get(kind, kind)  # the products in it are events of their own
    return above
