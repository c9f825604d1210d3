"""Options of `remoe train`: dataclasses that the command line, YAML files and a run's folder share.

Precedence: flags > YAML file (`--config`) > preset. No torch import: `--help` must be quick.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
import tyro

from remoe.errors import ConfigError, check, check_choice
from remoe.lab.generation import check_prompt
from remoe.lab.nested import merge
from remoe.lab.training.named_values import NamedValues, NamedWeights
from remoe.lab.training.presets import preset
from remoe.lab.training.renamed import renamed
from remoe.lab.training.yaml_files import read_yaml


@dataclass
class ModelOptions:
    """Shape of the transformer. The preset sets the defaults."""

    hidden_size: int = 128
    """Model width D."""
    num_hidden_layers: int = 4
    """Number of layers L."""
    num_attention_heads: int = 4
    """Number of attention heads H; must divide the width."""
    num_key_value_heads: int = 2
    """Number of key-value heads (grouped-query attention); must divide the number of attention heads."""
    intermediate_size: int | None = None
    """Width of one expert before the split by granularity; 4 * hidden_size by default."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    router_std: float | None = None
    """Standard deviation of the initial weights of routers that lambda controls (relu, relu_norm, relu_scaled). By
    default initializer_range; five times that in the preset tiny."""
    shared_expert_size: int = 0
    """Width of a shared expert, which every token uses in addition to the routed ones; 0 for none."""
    regularizer_normalization: str = "paper"
    """How the penalty is reduced over the layers. 'paper': mean; 'official': sum, as in the authors' code."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balance loss of routers that lambda does not control (topk, sparsemixer)."""
    backend: str = "auto"
    """Implementation that runs the experts: auto; cpu or grouped (any device); triton or sonic (CUDA); naive (the slow
    reference)."""


@dataclass
class OptimOptions:
    """The optimiser and the learning rate schedule."""

    name: str = "adamw"
    """adamw, or muon: Muon for the matrices of attention and experts (each expert's by itself), and AdamW for
    embeddings, head, norms and routers."""
    lr: float = 2e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up. 'cosine': along half a cosine, to the last step; 'wsd' (warm-up,
    stable, decay): it stays at the peak, and falls linearly over the last steps, so that a run can be prolonged."""
    final_lr_ratio: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    decay_ratio: float = 0.2
    """With the schedule 'wsd', the fraction of the steps over which the learning rate falls."""
    warmup_ratio: float = 0.02
    """Fraction of the steps over which the learning rate rises linearly."""
    warmup_steps: int | None = None
    """Number of those steps, instead of the fraction; a run that is prolonged keeps the one that it had."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norm weights are not decayed."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    clip: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""


@dataclass
class LoraOptions:
    """LoRA: with `--from`, small matrices beside the weights of attention and experts are trained in place of these."""

    rank: int = 0
    """Rank of the matrices; 0 trains all weights. The routers are trained in either case."""
    alpha: float | None = None
    """The change of a weight is alpha / rank times the product of its two matrices; 2 * rank by default."""


@dataclass
class SparsityOptions:
    """How lambda, the weight of the sparsity penalty, is controlled (relu, relu_norm, relu_scaled)."""

    rule: str = "smooth"
    """How lambda moves after each step. 'sign': the paper's Eq. 7; 'official': as in the authors' code; 'smooth':
    proportional to the error of the sparsity, damped and bounded; where the sparsity is too high, it opens experts,
    and with a balanced penalty always those with less than a quarter of their share; 'none': lambda is constant."""
    lambda_init: float = 1e-8
    """Initial lambda."""
    alpha: float = 1.2
    """Factor by which the rules 'sign' and 'official' multiply or divide lambda at each step."""
    fast_start: bool = False
    """After the first step, raise lambda until the penalty is 0.003 nats. This skips the dense stage, but training from
    scratch then ends at a higher loss."""


@dataclass
class ValidationOptions:
    """Validation during training."""

    every: int = 100
    """Steps between validations. The end of a run is always validated."""
    max_tokens: int = 40_000
    """Validation tokens during training (approximate), divided among the domains in proportion to their size. The final
    validation uses all tokens."""
    batch_size: int = 32
    """Sequences per forward pass."""
    flips_every: int = 0
    """Steps between measurements of the flip rate (arXiv 2412.14711, Fig. 10), the fraction of the routing decisions
    that one optimiser step changes; 0 for none."""
    flips_tokens: int = 4096
    """Validation tokens on which the flip rate is measured (approximate); always the same ones."""


@dataclass
class CheckpointOptions:
    """How often checkpoints are saved, and which are kept."""

    every: int = 100
    """Steps between checkpoints. The end of a run, SIGINT and SIGTERM always save one."""
    keep: int = 2
    """Number of the newest checkpoints to keep."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this as well; 0 for none."""


FROM = "from"  # the field's name has an underscore, because this is a keyword of Python
FREE_NAMES = ("router_options", "domain_weights")  # the router and the data check the names in these


@dataclass
class TrainConfig:
    """Train a ReMoE language model. Without any flags: a small model, on the source code of Python's standard library.

    The defaults shown are those of --preset tiny. docs/guides/train.md lists those of the other presets. Flags take
    precedence over the file given with --config, and that file over the preset.
    """

    preset: str = "tiny"
    """Model size and training settings: tiny, mini, 182m, 469m or 978m."""
    data: str | None = None
    """Your text: a file or folder of .txt, .md, .jsonl, .csv, .parquet, ..., which is prepared once, next to the run;
    or a folder written by `remoe data prepare`; or token files of Megatron, PREFIX.bin and PREFIX.idx, or a folder of
    them. By default Python's standard library."""
    tokenizer: str | None = None
    """The tokenizer that made token files of Megatron, or that --stream shall use: a folder or a name on the hub. With
    --from, the model's by default. All other data has its own."""
    stream: bool = False
    """Read and tokenise the text of --data while the model trains, instead of preparing it first: a folder or file of
    .jsonl, .parquet or .csv, or hf:NAME[:CONFIG[:SPLIT]]. Documents are held out by a hash of their text, 2 % of them.
    Needs --tokenizer and the extra `datasets`."""
    text_column: str = "text"
    """With --stream, the column or key that contains the text."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Continue training the model in this folder: a run, one of its checkpoints, an export, or a model that `remoe
    convert` wrote. Its sizes, its router and the state of its sparsity control are kept; --data must be prepared with
    its tokenizer. The learning rate is then 3e-4 by default. With --steps 0 the model is only evaluated."""
    out: str | None = None
    """Folder of the run; a new one named runs/PRESET-ROUTER-seedN by default."""
    steps: int = 500
    """Number of optimiser steps."""
    seed: int = 0
    """Random seed of the initial weights and of the order of the data."""
    router: str = "relu"
    """How tokens choose experts: relu, relu_norm, relu_scaled, topk, sigmoid, sparsemixer, expert_choice, threshold,
    hash, lory, dense or dense_wide."""
    router_options: NamedValues = field(default_factory=dict)
    """Options of the router as names and values, for example `--router-options max_experts_per_token 4 load_balance
    false` with relu, or `warmup_k 6 warmup_steps 100` with topk. docs/routers.md lists the options of each router."""
    num_experts: int = 8
    """Number of experts E per layer, before the split by granularity."""
    k: int = 1
    """Target number of active experts per token, before the split by granularity: an average for some routers (relu),
    exact for others (topk). The experts of dense have k times the width."""
    granularity: int = 1
    """Split each expert into this many narrower ones, and activate this many times as many."""
    resume: bool = False
    """Continue the run in --out (by default the newest run under runs/) from its last checkpoint."""
    config: str | None = None
    """YAML file with any of these options; a dotted flag such as --optim.lr is a nested key."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch_size: int = 16
    """Sequences per optimiser step."""
    micro_batch_size: int = 16
    """Sequences per forward and backward pass; must divide the batch size (gradient accumulation). By default the
    largest divisor of the batch size that is at most the preset's value."""
    domain_weights: NamedWeights = field(default_factory=dict)
    """Weights of the domains in training, for example `--domain-weights code 2 manual 0.5`: a domain's share of the
    sequences is its weight over their sum, and each sequence is of one domain. Every domain needs one; 0 leaves it out.
    By default each domain has the share of its text, and sequences cross domains."""
    mask_documents: bool = False
    """Mask the documents of a sequence from each other, in training and in validation."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer that is trained for text. Data of `remoe data prepare` has its own tokenizer."""
    device: str = "auto"
    """auto (cuda if available, otherwise cpu), cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """auto (bfloat16 autocast on a GPU that supports it, otherwise float32), float32 or bfloat16."""
    mesh: str | None = None
    """Train on several processes, started by torchrun: sizes such as fsdp=4,ep=2. fsdp: processes over which the
    weights are sharded; ep: processes among which the experts are divided; tp: processes among which each matrix is
    cut; replicate: copies of the model. Each process has an equal part of every batch, and --micro-batch-size is of one
    process. docs/distributed.md has more."""
    mesh_load: str = "global"
    """The tokens among which the load of experts is counted for the router's balanced loss. 'global': those of the
    step's micro-batches so far, on all processes; 'official': those of one micro-batch on one process, as in the
    authors' code. Without gradient accumulation and --mesh, both are the whole batch."""
    mesh_timeout: int = 600
    """With --mesh, seconds that a process waits for the others before it stops, for example because one hangs."""
    compile: bool = False
    """Compile the model with torch.compile; needs a C++ compiler."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    log_every: int = 1
    """Steps between records in metrics.jsonl and TensorBoard."""
    print_every: int = 20
    """Steps between progress lines."""
    live: bool = False
    """Serve a page on 127.0.0.1 that shows the run as it grows; `remoe watch RUN` serves it for any run."""
    log: list[str] = field(default_factory=list)
    """Programs that get the records too: wandb (Weights & Biases), trackio, or both."""
    prompt: str | None = None
    """Prompt of the text sample at the end; the start of a validation text by default."""
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    sparsity: SparsityOptions = field(default_factory=SparsityOptions)
    validate: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    @property
    def experts_per_layer(self) -> int:
        """E G: experts of a layer, after the split by granularity."""
        return self.num_experts * self.granularity

    @property
    def active_per_token(self) -> int:
        """k G: target number of a token's active experts in a layer, after the split by granularity."""
        return self.k * self.granularity

    def check(self) -> None:
        """Raises ConfigError for values that cannot work and that neither the model nor the data checks."""
        counts = ("steps", "seq_len", "batch_size", "micro_batch_size", "log_every", "print_every", "mesh_timeout")
        for name in counts:
            least = 0 if name == "steps" and self.from_ is not None else 1
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, but is {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"unknown --dtype {self.dtype!r}; choose one of: auto, float32, bfloat16")
        check_choice("--mesh-load", self.mesh_load, ("global", "official"))
        check_choice("--optim.name", self.optim.name, ("adamw", "muon"))
        check_choice("--optim.schedule", self.optim.schedule, ("cosine", "wsd"))
        for name, words, value in self._ranges():
            check(_HOLDS[words](value), f"--{name} must be {words}, but is {value}")
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.optim.name == "muon":
            check(
                self.mesh is None and not self.lora.rank, "--optim.name muon cannot be used with --mesh or --lora.rank"
            )
        if self.lora.rank:
            check(self.from_ is not None, "--lora.rank needs a model to adapt: name it with --from")
            check(self.mesh is None and not self.compile, "--lora.rank cannot be used with --mesh or --compile yet")

    def _ranges(self) -> list[tuple[str, str, float]]:
        """(flag, one of _HOLDS, value)."""
        optim, some, above_zero, share = self.optim, "at least 1", "finite and above 0", "between 0 and 1"
        return [
            ("seed", "at least 0 and below 2^63", self.seed),
            ("optim.lr", above_zero, optim.lr),
            ("optim.final-lr-ratio", share, optim.final_lr_ratio),
            ("optim.warmup-ratio", share, optim.warmup_ratio),
            ("optim.warmup-steps", "at least 0", optim.warmup_steps or 0),
            ("optim.decay-ratio", share, optim.decay_ratio),
            ("optim.weight-decay", "finite and at least 0", optim.weight_decay),
            ("optim.beta1", "at least 0 and below 1", optim.beta1),
            ("optim.beta2", "at least 0 and below 1", optim.beta2),
            ("optim.clip", above_zero, optim.clip),
            ("lora.rank", "at least 0", self.lora.rank),
            ("lora.alpha", above_zero, 1.0 if self.lora.alpha is None else self.lora.alpha),
            ("sparsity.lambda-init", above_zero, self.sparsity.lambda_init),
            ("sparsity.alpha", "finite and above 1", self.sparsity.alpha),
            ("model.router-aux-loss-coef", "finite and at least 0", self.model.router_aux_loss_coef),
            ("model.initializer-range", above_zero, self.model.initializer_range),
            ("model.router-std", above_zero, 1.0 if self.model.router_std is None else self.model.router_std),
            ("validate.every", some, self.validate.every),
            ("validate.max-tokens", some, self.validate.max_tokens),
            ("validate.batch-size", some, self.validate.batch_size),
            ("validate.flips-every", "at least 0", self.validate.flips_every),
            ("validate.flips-tokens", some, self.validate.flips_tokens),
            ("checkpoint.every", some, self.checkpoint.every),
            ("checkpoint.keep", some, self.checkpoint.keep),
            ("checkpoint.keep-every", "at least 0", self.checkpoint.keep_every),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in a run's config.yaml; `from_` is called "from", as on the command line."""
        return {FROM if name == "from_" else name: value for name, value in dataclasses.asdict(self).items()}


# Whether a number is what these words say; a number that is none is not.
_HOLDS = {
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "at least 0 and below 2^63": lambda value: 0 <= value < 2**63,
    "finite and at least 0": lambda value: 0 <= value < math.inf,
    "finite and above 0": lambda value: 0 < value < math.inf,
    "finite and above 1": lambda value: 1 < value < math.inf,
}
_ADAPTER = pydantic.TypeAdapter(TrainConfig)


def config_from_dict(values: dict[str, Any], source: str) -> TrainConfig:
    """A TrainConfig from nested options.

    Args:
        values: options; missing ones take the defaults of the preset that `values` names, and the micro-batch size is
            made to divide the batch size. Names of version 0.1.0 are accepted, see `renamed`.
        source: where they come from, for error messages.

    Raises:
        ConfigError: for an unknown option, or a value of the wrong type.
    """
    values = renamed(values)
    merged = merge(preset_values(str(values.get("preset", "tiny"))), values)
    known = TrainConfig().to_dict()
    for path in _unknown(merged, known):
        raise ConfigError(f"{source}: unknown option {path!r}")
    try:
        config = _ADAPTER.validate_python({"from_" if name == FROM else name: value for name, value in merged.items()})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place, reason = first["loc"], first["msg"]
        if place[0] == "router_options" and len(place) > 1:  # pydantic names the first of several possible types
            place, reason = place[:2], "must be true or false, a number, a word or null"
        raise ConfigError(f"{source}: {'.'.join(map(str, place)).rstrip('_')}: {reason}") from error
    if "micro_batch_size" not in values:
        sizes = range(1, min(config.batch_size, config.micro_batch_size) + 1)
        config.micro_batch_size = max((size for size in sizes if config.batch_size % size == 0), default=1)
    return config


def config_from_yaml(path: str | Path) -> TrainConfig:
    """The TrainConfig of a YAML file.

    Raises:
        ConfigError: when the file cannot be read, is not a mapping, or holds unknown options.
    """
    return config_from_dict(read_options(path), str(path))


def read_options(path: str | Path) -> dict[str, Any]:
    """The nested options in a YAML file; raises ConfigError when it cannot be read or is not a mapping."""
    values = read_yaml(path, "configuration")
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} is not a mapping of options")
    return values


def preset_values(name: str) -> dict[str, Any]:
    """The options that a preset sets, including the preset's name."""
    return {"preset": name, **preset(name)}


def _unknown(values: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of unknown options, without the names in FREE_NAMES."""
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
        elif isinstance(known[key], dict) and isinstance(value, dict) and key not in FREE_NAMES:
            yield from _unknown(value, known[key], f"{prefix}{key}.")
