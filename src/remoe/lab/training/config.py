"""Options of `remoe train`: dataclasses that the command line, YAML files and a run's folder share.

Order of precedence: preset < YAML file (`--config`) < flags. No torch import: `--help` must be quick.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
import tyro
import yaml

from remoe.errors import ConfigError
from remoe.lab.generation import check_prompt
from remoe.lab.training.presets import preset


@dataclass
class ModelOptions:
    """Shape of the transformer; a preset sets it."""

    hidden_size: int = 128
    """Width D."""
    num_hidden_layers: int = 4
    """Layers L."""
    num_attention_heads: int = 4
    """Attention heads H; must divide the width."""
    num_key_value_heads: int = 2
    """Key-value groups (GQA); must divide the heads."""
    intermediate_size: int | None = None
    """Width of one expert before the split by granularity; 4 * hidden_size by default."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    shared_expert_size: int = 0
    """Width of an expert that every token goes through, beside the routed ones; 0 for none."""
    max_experts_per_token: int | None = None
    """Cap on the experts a token may use, counted after the split by granularity; at least k (relu, relu_scaled)."""
    load_balance: bool = True
    """Weight the L1 penalty by each expert's load, Eq. 10-11 (relu; relu_scaled with penalty l1)."""
    regularizer_normalization: str = "paper"
    """'paper': mean of the penalty over layers; 'official': sum, as in the authors' code."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balance penalty of routers that lambda does not steer (topk, sparsemixer)."""
    experts_backend: str = "auto"
    """How experts are run: auto; loop, grouped (everywhere); triton, sonic (CUDA); naive (slow, the specification)."""


@dataclass
class OptimOptions:
    """AdamW and its schedule."""

    lr: float = 2e-3
    """Peak learning rate."""
    final_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_ratio: float = 0.02
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: float = 0.1
    """Decay of matrices; norms are not decayed."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""


@dataclass
class SparsityOptions:
    """Control of lambda (relu, relu_norm, relu_scaled)."""

    rule: str = "smooth"
    """'sign': the paper's Eq. 7; 'official': the authors' code; 'smooth': proportional, damped, bounded; 'none':
    lambda stays."""
    lambda_init: float = 1e-8
    """lambda_0."""
    alpha: float = 1.2
    """Factor of the sign rules."""
    fast_start: bool = False
    """Raise lambda after the first step to where the penalty is 0.003 nats: no dense stage, but a higher loss when
    training from scratch."""


@dataclass
class ValidationOptions:
    """Validation during training."""

    every: int = 100
    """Steps between validations; there is always one at the end."""
    max_tokens: int = 40_000
    """About so many tokens, shared out over the domains by size, during training; the last validation uses all."""
    batch_size: int = 32
    """Sequences per forward pass."""
    flips_every: int = 0
    """Steps between measurements of the flip rate (arXiv 2412.14711, Fig. 10): the share of the routing of
    --validate.flips-tokens validation tokens that one step changes; 0 for none."""
    flips_tokens: int = 4096
    """About so many tokens for it, always the same ones."""


@dataclass
class CheckpointOptions:
    """Saving."""

    every: int = 100
    """Steps between checkpoints; there is always one at the end and at SIGINT or SIGTERM."""
    keep: int = 2
    """The newest checkpoints that are kept."""
    keep_every: int = 0
    """Keep for good each checkpoint whose step is a multiple of this; 0 for none."""


# As YAML has them.
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None}


OptionValue = bool | int | float | str | None


def _pairs(words: list[str]) -> dict[str, OptionValue]:
    """`["warmup_k", "6"]` as `{"warmup_k": 6}`."""
    if len(words) % 2:
        raise ValueError("names and values must alternate")
    return {name: _value(word) for name, word in zip(words[::2], words[1::2], strict=True)}


def _value(word: str) -> OptionValue:
    if word.lower() in FLAGS:
        return FLAGS[word.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


# One flag with any number of words: by itself tyro would give each key of a default a flag of its own.
NamedValues = Annotated[
    dict[str, OptionValue],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME VALUE ...",
        instance_from_str=_pairs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    ),
]


@dataclass
class TrainConfig:
    """Train a ReMoE language model. Without any argument: a small one, on Python's own standard library.

    The defaults that are shown are those of --preset tiny; what other presets have stands in docs/guide.md.
    """

    preset: str = "tiny"
    """Model size and training settings: tiny, mini, 182m, 469m or 978m."""
    data: str | None = None
    """Folder written by `remoe data prepare`; by default the standard library is prepared beside the run."""
    out: str | None = None
    """The run's folder; by default a new one: runs/PRESET-ROUTER-seedN."""
    steps: int = 500
    """Optimiser steps."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    router: str = "relu"
    """relu, relu_norm, relu_scaled, topk, sigmoid, sparsemixer, expert_choice, threshold, hash, lory, dense or
    dense_wide."""
    router_options: NamedValues = field(default_factory=dict)
    """Options of the router's class, name by value, as in `--router-options warmup_k 6 warmup_steps 100`."""
    num_experts: int = 8
    """Experts E per layer, before the split by granularity."""
    k: int = 1
    """Wanted active experts per token: a mean or exact, as the router has it; dense gets the width of k."""
    granularity: int = 1
    """Split each expert into this many narrower ones; k is multiplied likewise."""
    resume: bool = False
    """Continue the run in --out (or the newest one under runs/) from its last checkpoint."""
    config: str | None = None
    """YAML file with any of these options, nested like the dotted flags."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch_size: int = 16
    """Sequences per optimiser step."""
    micro_batch_size: int = 16
    """Sequences per forward and backward pass; divides the batch size (gradient accumulation). By default the preset's,
    or the largest divisor of the batch size below it."""
    vocab_size: int = 4096
    """Vocabulary of the tokenizer trained for the default data; other data brings its own."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """auto (bfloat16 autocast on a GPU that has it, else float32), float32 or bfloat16."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler)."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    log_every: int = 1
    """Steps between records in metrics.jsonl and TensorBoard."""
    print_every: int = 20
    """Steps between progress lines."""
    prompt: str | None = None
    """Prompt of the text sample at the end; by default the start of a validation text."""
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    sparsity: SparsityOptions = field(default_factory=SparsityOptions)
    validate: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work and that no later part checks."""
        for name in ("steps", "seq_len", "batch_size", "micro_batch_size", "log_every", "print_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"unknown --dtype {self.dtype!r}; choose one of: auto, float32, bfloat16")
        for name, allowed, value in self._ranges():
            low, high = allowed
            if not low <= value < high:
                raise ConfigError(f"--{name} must be at least {low:g} and below {high:g}, but is {value}")
        if self.prompt is not None:
            check_prompt(self.prompt)

    def _ranges(self) -> list[tuple[str, tuple[float, float], float]]:
        """(flag, (lowest, first too high), value); NaN is in no range."""
        some, above_zero, share = (1, math.inf), (1e-45, math.inf), (0, math.nextafter(1, 2))
        optim = self.optim
        return [
            ("seed", (0, 2**63), self.seed),
            ("optim.lr", above_zero, optim.lr),
            ("optim.final-lr-ratio", share, optim.final_lr_ratio),
            ("optim.warmup-ratio", share, optim.warmup_ratio),
            ("optim.weight-decay", (0, math.inf), optim.weight_decay),
            ("optim.beta1", (0, 1), optim.beta1),
            ("optim.beta2", (0, 1), optim.beta2),
            ("optim.clip", above_zero, optim.clip),
            ("sparsity.lambda-init", above_zero, self.sparsity.lambda_init),
            ("sparsity.alpha", (math.nextafter(1, 2), math.inf), self.sparsity.alpha),
            ("model.router-aux-loss-coef", (0, math.inf), self.model.router_aux_loss_coef),
            ("model.initializer-range", above_zero, self.model.initializer_range),
            ("validate.every", some, self.validate.every),
            ("validate.max-tokens", some, self.validate.max_tokens),
            ("validate.batch-size", some, self.validate.batch_size),
            ("validate.flips-every", (0, math.inf), self.validate.flips_every),
            ("validate.flips-tokens", some, self.validate.flips_tokens),
            ("checkpoint.every", some, self.checkpoint.every),
            ("checkpoint.keep", some, self.checkpoint.keep),
            ("checkpoint.keep-every", (0, math.inf), self.checkpoint.keep_every),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in a run's config.yaml."""
        return dataclasses.asdict(self)


_FREE = {"out", "resume", "config", "data", "log_every", "print_every", "device", "prompt"}
_FREE_GROUPS = ("validate.", "checkpoint.")
_ADAPTER = pydantic.TypeAdapter(TrainConfig)


def config_from_dict(values: dict[str, Any], source: str) -> TrainConfig:
    """A checked TrainConfig.

    Args:
        values: nested options; missing ones take the defaults of the preset that `values` names, and the micro-batch
            size is made to divide the batch size.
        source: where they come from, for error messages.

    Raises:
        ConfigError: for an unknown option or a value of the wrong type.
    """
    merged = merge(preset_values(str(values.get("preset", "tiny"))), values)
    known = TrainConfig().to_dict()
    for path in _unknown(merged, known):
        raise ConfigError(f"{source}: unknown option {path!r}")
    try:
        config = _ADAPTER.validate_python(merged)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place, reason = first["loc"], first["msg"]
        if place[0] == "router_options" and len(place) > 1:  # the first of several types that it might have
            place, reason = place[:2], "must be true or false, a number, a word or null"
        raise ConfigError(f"{source}: {'.'.join(map(str, place))}: {reason}") from error
    if "micro_batch_size" not in values:
        sizes = range(1, min(config.batch_size, config.micro_batch_size) + 1)
        config.micro_batch_size = max((size for size in sizes if config.batch_size % size == 0), default=1)
    return config


class StrictLoader(yaml.SafeLoader):
    """A key given twice is an error: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for twice in (key for index, key in enumerate(keys) if key in keys[:index]):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class StrictDumper(yaml.SafeDumper):
    """Writes what StrictLoader reads: a word that looks like a number to it is quoted."""


# YAML 1.1 reads 1e-3 as a word; people mean a number.
for either in (StrictLoader, StrictDumper):
    either.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def to_yaml(options: dict[str, Any]) -> str:
    """Options as the text of a YAML file, in their order."""
    return yaml.dump(options, Dumper=StrictDumper, sort_keys=False)


def read_yaml(path: str | Path, kind: str) -> Any:
    """What a YAML file holds; a ConfigError in one line, which calls it a `kind`, where it cannot be read."""
    try:
        return yaml.load(Path(path).read_text(), StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {kind} {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"cannot read {kind} {path}{where}: {what}") from error


def config_from_yaml(path: str | Path, **overrides: Any) -> TrainConfig:
    """TrainConfig of a YAML file; `overrides` go first.

    Raises:
        ConfigError: when the file is missing, is no mapping, or holds unknown options.
    """
    values = read_yaml(path, "configuration")
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} is not a mapping of options")
    return config_from_dict({**values, **overrides}, str(path))


def preset_values(name: str) -> dict[str, Any]:
    """Options that a preset sets, the preset's name among them."""
    return {"preset": name, **preset(name)}


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Options in which two configurations differ, by dotted name: (old, new); None for one that is not given."""
    flat_old, flat_new = dict(flatten(old.to_dict())), dict(flatten(new.to_dict()))
    pairs = {name: (flat_old.get(name), flat_new.get(name)) for name in {**flat_old, **flat_new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def changes_result(name: str) -> bool:
    """Whether an option, by its dotted name, plays a part in what is computed; a resumed run may have others."""
    return name not in _FREE and not name.startswith(_FREE_GROUPS)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Items of a nested dict by dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with `top` laid over it, nested dicts item by item."""
    merged = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _unknown(values: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names that are no options; what stands in `router_options` only the router knows."""
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
        elif isinstance(known[key], dict) and isinstance(value, dict) and key != "router_options":
            yield from _unknown(value, known[key], f"{prefix}{key}.")
