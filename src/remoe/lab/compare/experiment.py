"""An experiment file and the runs that it defines.

No other file is read or written, except the configuration of a model that a run starts from.

Precedence of a run's options: variant > axis > base. A variant that sets an axis's option therefore keeps its value at
every point, and one run serves all points.
"""

import difflib
import functools
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pydantic

from remoe.errors import CheckpointError, ConfigError
from remoe.lab.compare.keys import FORMER_NAMES, key_of
from remoe.lab.nested import flatten, merge
from remoe.lab.training.config import FREE_NAMES, FROM, TrainConfig, config_from_dict
from remoe.lab.training.yaml_files import read_yaml

logger = logging.getLogger(__name__)

Point = tuple[tuple[str, Any], ...]  # (dotted option, value) of each axis

# Options of `remoe train` that an experiment file cannot set, and what sets them instead.
RESERVED = {
    "data": "use --data or --corpus",
    "out": "use --pool",
    "resume": "unfinished runs are always continued",
    "config": "write its options here",
    "seed": "use seeds",
    "device": "use --device",
}
LABEL_LENGTH = 60
MOST_RUNS, MANY_RUNS = 10_000, 1_000  # checking the options of as many takes ten seconds, and one
VARIANT_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # also used in the names of figures' files
FIGURES = 4  # variants drawn if the file names none

# Type of each key of an experiment file, for error messages.
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
    """One of the systems compared.

    Attributes:
        options: nested options of `remoe train`.
        seeds: the variant's own seeds, or the experiment's.
        equal_flops: whether it takes part in the comparison at equal training FLOPs.
    """

    options: dict[str, Any]
    seeds: list[int]
    equal_flops: bool


@dataclass(frozen=True)
class RunSpec:
    """One training run that an experiment asks for.

    Attributes:
        label: a readable name.
        options: nested options that the experiment sets, including seed and steps.
        config: the same options with all defaults filled in.
        key: hash of the options that differ from the preset and influence the result, so that options added to
            `remoe train` later do not change it.
    """

    variant: str
    point: Point
    seed: int
    steps: int
    label: str
    options: dict[str, Any] = field(compare=False, repr=False)
    config: TrainConfig = field(compare=False, repr=False)
    key: str = field(repr=False)


@functools.cache  # called repeatedly while the live table is shown
def with_steps(run: RunSpec, steps: int, suffix: str) -> RunSpec:
    """The same run with another number of steps, and `suffix` appended to its label."""
    options = {**run.options, "steps": steps}
    fresh = run.config.from_ is None  # otherwise some of its options are the model's
    config = config_from_dict(options, run.label) if fresh else replace(run.config, steps=steps)
    return RunSpec(run.variant, run.point, run.seed, steps, run.label + suffix, options, config, key_of(config))


@dataclass
class Experiment:
    """An experiment file.

    Attributes:
        name: the file's name without its suffix.
        reference: the variant that the others are compared with, and whose FLOPs set the budget.
        equal_flops: whether there is a comparison at equal training FLOPs.
        axes: values of each dotted option; every combination is a point.
        figures: the variants whose routing is drawn.
        runs: all runs of the comparison at equal tokens, in training order: all variants of a seed, then those of the
            next.
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
    runs: list[RunSpec] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        """The cross product of the axes; a single empty point if there are none."""
        values = ([(name, value) for value in choices] for name, choices in self.axes.items())
        return list(itertools.product(*values))


def load_experiment(path: str | Path, base: Mapping[str, Any] = MappingProxyType({})) -> Experiment:
    """Reads an experiment file and checks the options of every run.

    Args:
        path: the file.
        base: dotted options that override the file's base.

    Raises:
        ConfigError: if the file cannot be read, has an unknown key, or has options that `remoe train` refuses.
    """
    path = Path(path)
    given = read_yaml(path, "experiment")
    if not isinstance(given, dict):
        raise ConfigError(f"experiment {path} is not a mapping")
    if base and isinstance(given.get("base") or {}, dict):
        given["base"] = merge(given.get("base") or {}, _nested(base.items()))
    return experiment_from_dict(given, path.stem, str(path))


def experiment_from_dict(given: dict[str, Any], name: str, source: str) -> Experiment:
    """Builds an experiment from the content of its file.

    Args:
        given: the content.
        name: the experiment's name.
        source: the file's name, for error messages.

    Raises:
        ConfigError: for an unknown key or an invalid value.
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
            raise ConfigError(f"{source}: {key}: {variant!r} is not one of the variants{guess}")
    for variant in variants:
        if not VARIANT_NAME.fullmatch(variant):
            raise ConfigError(f"{source}: variant {variant!r}: a name has only letters, digits, '_', '.' and '-'")
    points = math.prod(map(len, file.axes.values()))
    runs = points * sum(len(variant.seeds) for variant in variants.values())
    if runs > MOST_RUNS:
        raise ConfigError(f"{source}: {runs:,} runs, of {points:,} points; an experiment has at most {MOST_RUNS:,}")
    if runs > MANY_RUNS:
        logger.warning("checking the options of %s runs, which takes a while", f"{runs:,}")
    for axis, values in file.axes.items():
        if any(isinstance(value, dict | list) for value in values):
            raise ConfigError(f"{source}: axes: {axis} needs plain values; write a variant for each mapping")
        _check_options(_nested([(axis, None)]), f"{source}: axes")
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{source}: axes: {axis} needs at least one value, and each value only once")
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
        raise ConfigError(f"{source}: vocab_size must be the same in all runs, because they share their data")
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
    known = {*_names(TrainConfig().to_dict())}
    for name in _names(options):
        if name not in known and name not in FORMER_NAMES:
            raise ConfigError(f"{source}: unknown option {name!r}{_perhaps(name, known - RESERVED.keys())}")


def _names(options: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of options and groups, without the names in FREE_NAMES."""
    for key, value in options.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and key not in FREE_NAMES:
            yield from _names(value, f"{prefix}{key}.")


def _perhaps(name: Any, known: Iterable[str]) -> str:
    """A suggestion: an option of that name in another group, otherwise a similar name."""
    known, last = sorted(known), str(name).rpartition(".")[2]
    found = [one for one in known if one.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(str(name), known, n=1)
    return f"; perhaps {' or '.join(found)}" if found else ""


def _check_seeds(seeds: list[int], source: str) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{source}: seeds must name at least one seed, and each seed only once")


def _runs(experiment: Experiment) -> list[RunSpec]:
    own = (seed for variant in experiment.variants.values() for seed in variant.seeds)
    return [
        _run(experiment, name, point, seed)
        for seed in dict.fromkeys([*experiment.seeds, *own])
        for point in experiment.points
        for name, variant in experiment.variants.items()
        if seed in variant.seeds
    ]


def _run(experiment: Experiment, name: str, point: Point, seed: int) -> RunSpec:
    own = merge(_nested(point), experiment.variants[name].options)
    options = {**merge(experiment.base, own), "seed": seed}
    place = f"variant {name}" + (f" at {describe(point)}" if point else "")
    _check_spelling(options, f"experiment {experiment.name}, {place}")
    config = _config(options, f"experiment {experiment.name}, {place}")
    options["steps"] = config.steps
    return RunSpec(name, point, seed, config.steps, _label(config, own), options, config, key_of(config))


def _config(options: dict[str, Any], source: str) -> TrainConfig:
    """All options of a run; of one that starts from a model (`from`), those of the model are among them."""
    if not options.get(FROM):
        return config_from_dict(options, source)
    from remoe.lab.training.origin import open_origin  # needs PyTorch

    try:
        return open_origin(str(options[FROM]), verified=False).base(options, source)
    except CheckpointError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_spelling(options: dict[str, Any], source: str) -> None:
    given = dict(flatten(options))
    for old, (new, _) in FORMER_NAMES.items():
        if old in given and new in given:
            raise ConfigError(f"{source}: {old} is the former name of {new}; set only the latter")


def _label(config: TrainConfig, own: dict[str, Any]) -> str:
    """Preset, router, the options that vary within the experiment, seed."""
    values = dict(flatten(config.to_dict()))
    parts = [config.preset, config.router]
    for name, given in flatten(own):
        if name == FROM:
            parts.append(Path(str(given)).name)
        elif name not in ("preset", "router"):
            today = FORMER_NAMES.get(name, (name,))[0]
            parts.append(_word(name.rpartition(".")[2], values.get(today, values.get(name, given))))
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
