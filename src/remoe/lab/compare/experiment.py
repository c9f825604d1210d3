"""An experiment file, and the runs that it asks for. Pure: nothing here reads or writes anything but that file.

A run's options are laid over each other in this order: base, axis point, variant. A variant that sets an axis's
option itself therefore keeps it at every point, and one run serves all of them.
"""

import difflib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pydantic

from remoe.errors import ConfigError
from remoe.lab.training.config import RENAMED, TrainConfig, changes_result, config_from_dict, flatten, merge, renamed
from remoe.lab.training.yaml_files import read_yaml
from remoe.routing import ROUTERS, router_options

Point = tuple[tuple[str, Any], ...]  # (dotted option, value) of each axis

# Options of `remoe train` that an experiment leaves to `remoe compare`, and where it takes them from.
RESERVED = {
    "data": "use --data or --corpus",
    "out": "use --pool",
    "resume": "unfinished runs are continued anyway",
    "config": "write the options themselves",
    "seed": "use seeds",
    "device": "use --device",
}
LABEL_LENGTH = 60
VARIANT_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # of figures' files too
FIGURES = 4  # variants drawn when none are named

# What each key of an experiment file must be, for error messages.
KINDS = {
    "variants": "a mapping, name: {options}",
    "title": "text",
    "base": "a mapping of options",
    "seeds": "a list of whole numbers",
    "reference": "the name of a variant",
    "equal_flops": "true or false",
    "axes": "a mapping, option: [values]",
    "figures": "a list of variants",
}


@dataclass
class Variant:
    """One of the things compared.

    Attributes:
        options: of `remoe train`, nested.
        seeds: its own, or the experiment's.
        equal_flops: whether it takes part in the comparison at equal training FLOPs.
    """

    options: dict[str, Any]
    seeds: list[int]
    equal_flops: bool


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label: what a person calls it.
        options: all options that the experiment gives, nested, seed and steps among them.
        config: the same with every default.
        key: hash of the options that are not its preset's and that change the result: an option that `remoe train`
            gets later changes nothing.
    """

    variant: str
    point: Point
    seed: int
    steps: int
    label: str
    options: dict[str, Any] = field(compare=False, repr=False)
    config: TrainConfig = field(compare=False, repr=False)
    key: str = field(repr=False)


@functools.cache  # asked for again and again while runs are watched
def with_steps(run: Run, steps: int, suffix: str) -> Run:
    """The same run with another number of steps and `suffix` behind its label."""
    options = {**run.options, "steps": steps}
    config = config_from_dict(options, run.label)
    return Run(run.variant, run.point, run.seed, steps, run.label + suffix, options, config, key_of(config))


@dataclass
class Experiment:
    """An experiment file.

    Attributes:
        name: the file's, without its suffix.
        reference: the variant that others are compared with, and whose FLOPs set the budget.
        equal_flops: whether there is a comparison at equal training FLOPs at all.
        axes: values of each dotted option; every combination is a point.
        figures: the variants whose routing is drawn.
        runs: every run of the comparison at equal tokens, the most important first: all variants of a seed, then
            those of the next.
    """

    name: str
    title: str
    base: dict[str, Any]
    seeds: list[int]
    reference: str
    equal_flops: bool
    axes: dict[str, list[Any]]
    variants: dict[str, Variant]
    figures: list[str]
    runs: list[Run] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        """The cross product of the axes; one empty point when there are none."""
        values = ([(name, value) for value in choices] for name, choices in self.axes.items())
        return list(itertools.product(*values))


def load_experiment(path: str | Path, base: Mapping[str, Any] = MappingProxyType({})) -> Experiment:
    """Reads and checks an experiment file, the options of every run among it.

    Args:
        path: of the file.
        base: dotted options laid over the file's base.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, or options that `remoe train` would refuse.
    """
    path = Path(path)
    given = read_yaml(path, "experiment")
    if not isinstance(given, dict):
        raise ConfigError(f"experiment {path} is not a mapping")
    if base and isinstance(given.get("base") or {}, dict):
        given["base"] = merge(given.get("base") or {}, _nested(base.items()))
    return experiment_from_dict(given, path.stem, str(path))


def experiment_from_dict(given: dict[str, Any], name: str, source: str) -> Experiment:
    """An experiment from the content of its file.

    Args:
        given: the content.
        name: of the experiment.
        source: where it comes from, for error messages.

    Raises:
        ConfigError: for an unknown key or a value that cannot be.
    """
    for key in given:
        if key not in KINDS:
            raise ConfigError(f"{source}: {key}: unknown key{_perhaps(key, KINDS)}")
    file: _File = _validate(_FILE, given, source)
    if not file.variants:
        raise ConfigError(f"{source}: variants is empty")
    _check_options(file.base, f"{source}: base")
    _check_seeds(file.seeds, source)
    variants = {key: _variant(value, file.seeds, f"{source}: variant {key}") for key, value in file.variants.items()}
    reference = file.reference or next(iter(variants))
    for key, variant in [("reference", reference), *(("figures", name) for name in file.figures)]:
        if variant not in variants:
            guess = _perhaps(variant, variants) or f": {', '.join(variants)}"
            raise ConfigError(f"{source}: {key}: {variant!r} is none of the variants{guess}")
    for variant in variants:
        if not VARIANT_NAME.fullmatch(variant):
            raise ConfigError(f"{source}: variant {variant!r}: only letters, digits, '_', '.' and '-' make a name")
    for axis, values in file.axes.items():
        if any(isinstance(value, dict | list) for value in values):
            raise ConfigError(f"{source}: axes: {axis} needs plain values; make each mapping a variant")
        _check_options(_nested([(axis, None)]), f"{source}: axes")
        if not values or any(value in values[:index] for index, value in enumerate(values)):
            raise ConfigError(f"{source}: axes: {axis} needs values, each of them once")
    experiment = Experiment(
        name=name,
        title=file.title or name,
        base=file.base,
        seeds=file.seeds,
        reference=reference,
        equal_flops=file.equal_flops,
        axes=file.axes,
        variants=variants,
        figures=file.figures or [*variants][:FIGURES],
    )
    experiment.runs = _runs(experiment)
    for run in experiment.runs:
        try:
            run.config.check()
        except ConfigError as error:
            raise ConfigError(f"{source}: {run.label}: {error}") from error
    if len({run.config.vocab_size for run in experiment.runs}) > 1:
        raise ConfigError(f"{source}: vocab_size must be the same in all runs: they share their data")
    return experiment


def describe(point: Point) -> str:
    """A point in words: `num_experts 8, k 2`."""
    return ", ".join(f"{name} {value}" for name, value in point)


@dataclass
class _File:
    variants: dict[str, dict[str, Any] | None]
    title: str | None = None
    base: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    reference: str | None = None
    equal_flops: bool = True
    axes: dict[str, list[Any]] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)


@dataclass
class _VariantKeys:
    seeds: list[int] | None = None
    equal_flops: bool = True


_FILE = pydantic.TypeAdapter(_File)
_VARIANT = pydantic.TypeAdapter(_VariantKeys)


def _validate(adapter: pydantic.TypeAdapter, values: dict[str, Any], source: str) -> Any:
    try:
        return adapter.validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key, *inner = first["loc"]
        place = f"{'.'.join(map(str, first['loc']))}: " if inner else ""
        reason = "is missing" if first["type"] == "missing" else f"must be {KINDS[key]}"
        raise ConfigError(f"{source}: {place}{key} {reason}") from error


def _variant(given: dict[str, Any] | None, seeds: list[int], source: str) -> Variant:
    options = dict(given or {})
    own = {key: options.pop(key) for key in ("seeds", "equal_flops") if key in options}
    keys: _VariantKeys = _validate(_VARIANT, own, source)
    _check_options(options, source)
    if keys.seeds is not None:
        _check_seeds(keys.seeds, source)
    return Variant(options, seeds if keys.seeds is None else keys.seeds, keys.equal_flops)


def _check_options(options: dict[str, Any], source: str) -> None:
    for name in options:
        if name in RESERVED:
            raise ConfigError(f"{source}: {name} cannot be set here: {RESERVED[name]}")
        group, _, last = str(name).partition(".")
        if last:
            raise ConfigError(f"{source}: unknown option {name!r}; perhaps {group}: {{{last}: ...}}")
    known, old = {*_names(TrainConfig().to_dict())}, {f"model.{name}" for name in RENAMED}
    for name in _names(options):
        if name not in known | old:
            raise ConfigError(f"{source}: unknown option {name!r}{_perhaps(name, known - RESERVED.keys())}")


def _names(options: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of options and of their groups; what stands in `router_options` only the router knows."""
    for key, value in options.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and key != "router_options":
            yield from _names(value, f"{prefix}{key}.")


def _perhaps(name: Any, known: Iterable[str]) -> str:
    """What may have been meant: an option of that name in another group, or else a name that looks alike."""
    known, last = sorted(known), str(name).rpartition(".")[2]
    found = [one for one in known if one.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(str(name), known, n=1)
    return f"; perhaps {' or '.join(found)}" if found else ""


def _check_seeds(seeds: list[int], source: str) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{source}: seeds must name at least one seed, each of them once")


def _runs(experiment: Experiment) -> list[Run]:
    own = (seed for variant in experiment.variants.values() for seed in variant.seeds)
    return [
        _run(experiment, name, point, seed)
        for seed in dict.fromkeys([*experiment.seeds, *own])
        for point in experiment.points
        for name, variant in experiment.variants.items()
        if seed in variant.seeds
    ]


def _run(experiment: Experiment, name: str, point: Point, seed: int) -> Run:
    own = merge(_nested(point), experiment.variants[name].options)
    options = {**merge(experiment.base, own), "seed": seed}
    place = f"variant {name}" + (f" at {describe(point)}" if point else "")
    config = config_from_dict(options, f"experiment {experiment.name}, {place}")
    options["steps"] = config.steps
    return Run(name, point, seed, config.steps, _label(config, own), options, config, key_of(config))


def key_of(config: TrainConfig) -> str:
    """A run's key, for the options alone."""
    defaults = dict(flatten(config_from_dict({"preset": config.preset}, "preset").to_dict()))
    named = {name: getattr(config, name) for name in ("preset", "router", "steps", "seed")}
    router = router_options(ROUTERS[config.router]) if config.router in ROUTERS else {}
    floats = {f"router_options.{name}" for name, option in router.items() if option.annotation is float}
    changed = {
        name: float(value) if name in floats and type(value) is int else value  # 4 is 4.0
        for name, value in flatten(config.to_dict())
        if changes_result(name) and value != defaults.get(name)
    }
    content = json.dumps(named | changed, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _label(config: TrainConfig, own: dict[str, Any]) -> str:
    """Preset, router, the options that are not the same in the whole experiment, seed."""
    values = dict(flatten(config.to_dict()))
    own = renamed({**own, "router": config.router})
    names = [name for name, _ in flatten(own) if name not in ("preset", "router")]
    parts = [config.preset, config.router, *(_word(name.rpartition(".")[2], values[name]) for name in names)]
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join(parts))
    return f"{label[:LABEL_LENGTH]}-seed{config.seed}"


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, str):
        return value
    return f"{name}{value:g}" if isinstance(value, int | float) else f"{name}_{value}"


def _nested(point: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in point:
        *groups, last = name.split(".")
        for group in reversed(groups):
            last, value = group, {last: value}
        options = merge(options, {last: value})
    return options
