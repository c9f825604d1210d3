"""`--from`: the model that a run starts from, its options, and its weights."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from remoe.convert.relufy.model import MODEL_TYPE, STEERING, RelufiedMixin, class_of, load_relufied, relufied_config
from remoe.costs import ModelSizes, parameters
from remoe.errors import CheckpointError, ConfigError, RemoeError, check
from remoe.lab.nested import flatten, merge
from remoe.lab.training.changes import differences
from remoe.lab.training.checkpoint import sha256, verify
from remoe.lab.training.config import ModelOptions, TrainConfig, config_from_dict
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.shards import INDEX, fill, model_files, opened_weights, read_model
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.plan import sizes_of
from remoe.routing import build_router
from remoe.sparsity import SparsityController

LEARNING_RATE = 3e-4  # by default: that of the presets is for random weights
# Options that a run may set anew: they belong to the loss and its control, or to the machine.
_OPEN = ("model.backend", "model.regularizer_normalization", "model.router_aux_loss_coef", "sparsity.")
_CHECKED_APART = "router_options."


@dataclass(frozen=True)
class Origin:
    """A model in a folder, to be trained further.

    Attributes:
        folder: of `config.json` and the weights.
        tokenizer: folder of its tokenizer.
        config: as transformers reads it.
        data: the data that its run was trained on; None for a model that no run of ours trained.
    """

    folder: Path
    tokenizer: Path
    config: PreTrainedConfig
    data: str | None = None

    @property
    def relufied(self) -> bool:
        """Whether it is a transformers model that `relufy` converted, and not one of this package's own class."""
        return not isinstance(self.config, RemoeConfig)

    @property
    def shape(self) -> RemoeConfig:
        """The model's sizes; of a relufied model as if each of its layers were a mixture of experts."""
        return shape_of_relufied(self.config) if self.relufied else self.config

    def options(self) -> dict[str, Any]:
        """Nested options of `remoe train` that describe the model."""
        shape = self.shape
        return {
            "model": {field.name: getattr(shape, field.name) for field in fields(ModelOptions)},
            "router": shape.router,
            "router_options": shape.router_options or {},
            "num_experts": shape.num_experts,
            "k": shape.k,
            "granularity": shape.granularity,
            "sparsity": dict(shape.sparsity),
        }

    def base(self, given: dict[str, Any], source: str) -> TrainConfig:
        """All options of a run that starts here, before those of its flags.

        Args:
            given: nested options of a file, or those that decide about the defaults of others.
            source: where they come from, for error messages.

        Raises:
            ConfigError: for an option that contradicts the model.
        """
        own = dict(flatten(self.options()))
        for name, value in flatten(given):
            if name in own and not name.startswith((*_OPEN, _CHECKED_APART)) and value != own[name]:
                raise self._contradiction(name, value, own[name], source)
        # In two steps, because the default of the length is the preset's.
        length = config_from_dict(given, source).seq_len
        defaults = {"optim": {"lr": LEARNING_RATE}, "seq_len": min(length, self.shape.max_position_embeddings)}
        config = config_from_dict(merge(merge(defaults, self.options()), given), source)
        self._check_rest(config)
        return config

    def check(self, base: TrainConfig, config: TrainConfig) -> None:
        """Completes the options of the router, and checks those that were laid over `base`.

        Raises:
            ConfigError: for an option that contradicts the model.
        """
        config.router_options = base.router_options | config.router_options
        own = dict(flatten(self.options()))
        for name, (old, new) in differences(base, config).items():
            if name in own and not name.startswith((*_OPEN, _CHECKED_APART)):
                raise self._contradiction(name, new, old)
        self._check_rest(config)

    def _contradiction(self, name: str, new: object, old: object, source: str = "") -> ConfigError:
        place = f"{source}: " if source and source != "flags" else ""
        return ConfigError(f"{place}--{name.replace('_', '-')} {new}: the model in {self.folder} has {old}")

    def _check_rest(self, config: TrainConfig) -> None:
        if config.seq_len > (longest := self.shape.max_position_embeddings):
            raise ConfigError(f"--seq-len {config.seq_len}: the model in {self.folder} is for at most {longest} tokens")
        own = self.options()["router_options"]
        same = config.router_options == own
        if not same and (self.relufied or _router_tensors(self.shape, config.router_options) != self._tensors()):
            raise ConfigError(
                f"--router-options: those of the model in {self.folder} are {own or 'the defaults'}, and others would "
                "need other weights"
            )
        check(
            not (self.relufied and config.mask_documents),
            "--mask-documents cannot be used yet with a transformers model that `remoe convert relufy` converted",
        )
        check(
            not (self.relufied and config.mesh),
            "--mesh cannot be used yet with a transformers model that `remoe convert relufy` converted",
        )
        check(
            self.relufied or self.shape.max_experts is None or not config.mesh,
            "--mesh cannot be used yet with an export with --max-experts",
        )
        check(  # FSDP takes the embedding and the head apart, and each would be trained by itself
            not (self.shape.tie_word_embeddings and config.mesh),
            f"--mesh cannot be used yet with tied embeddings, which the model in {self.folder} has",
        )

    def _tensors(self) -> dict[str, torch.Size]:
        return _router_tensors(self.shape, self.options()["router_options"])

    def configured(self, config: TrainConfig) -> RemoeConfig:
        """The configuration of the model, or of its shape, with what a run sets anew."""
        values = self.shape.to_dict() | vars(config.model) | {"auto_map": None}
        values |= {"router_options": config.router_options or None, "sparsity": vars(config.sparsity).copy()}
        return RemoeConfig.from_dict(values)

    def sizes(self, config: TrainConfig) -> ModelSizes:
        """The sizes of the model, to estimate its memory; of a relufied one, with the number of its own parameters."""
        sizes = sizes_of(self.configured(config))
        if not self.relufied:
            return sizes
        with torch.device("meta"):
            model = class_of(self.config)(self.config)
        total = sum(weight.numel() for weight in model.parameters())
        return replace(sizes, others=sizes.others + total - parameters(sizes)[0])

    def load(self, config: TrainConfig) -> RemoeForCausalLM | RelufiedMixin:
        """The model in float32 on the CPU, with the state of its sparsity control, and what a run sets anew.

        Raises:
            CheckpointError: when it cannot be loaded, or lacks a weight.
        """
        try:
            options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
            if self.relufied:
                model, info = load_relufied(self.folder, **options)
                _steer(model, config)
            elif (self.folder / INDEX).exists():
                model, info = read_model(self.folder, self.configured(config)), {"missing_keys": []}
            else:
                model, info = RemoeForCausalLM.from_pretrained(self.folder, config=self.configured(config), **options)
        except RemoeError:
            raise
        except Exception as error:  # the libraries that transformers reads a folder with have no common base of errors
            raise CheckpointError(f"cannot load {self.folder}: {' '.join(str(error).split())[:300]}") from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{self.folder} lacks weights of the model: {', '.join(missing[:3])}")
        self._set_lambda(model, config)
        return model

    def fill(self, model: RemoeForCausalLM, config: TrainConfig) -> None:
        """Copies the weights and the state into a model that is sharded; each process reads its own parts.

        Raises:
            CheckpointError: when they cannot be read, or do not fit the model.
        """
        try:
            with opened_weights(self.folder) as weights:
                fill(model, weights, self.folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"cannot load {self.folder}: {' '.join(str(error).split())[:300]}") from error
        self._set_lambda(model, config)

    def _set_lambda(self, model: RemoeForCausalLM | RelufiedMixin, config: TrainConfig) -> None:
        if config.sparsity.lambda_init != self.shape.sparsity["lambda_init"]:
            model.sparsity.lam.fill_(config.sparsity.lambda_init)

    def hashes(self) -> dict[str, str]:
        """Sha256 (hex) of each file of weights."""
        return {path.name: sha256(path) for path in model_files(self.folder)}


def open_origin(path: str | Path, *, verified: bool = True) -> Origin:
    """The model in a run's folder, a checkpoint, an export, or a folder that `remoe convert` wrote.

    Args:
        path: the folder.
        verified: whether to compare the files of a checkpoint with their checksums, for which they are read.

    Raises:
        CheckpointError: when there is no model of ours, or it is damaged.
    """
    path = Path(path)
    run = run_of(path) or RunFolder(path)
    if run.config.exists():
        checkpoint = path if run.path != path else run.last_checkpoint(verified=verified)
        if checkpoint is None:
            raise CheckpointError(f"{path} has no checkpoint yet")
        if verified and checkpoint == path:
            verify(checkpoint)
        data = run.load_config().data
        return Origin(checkpoint.resolve(), run.tokenizer.resolve(), read_config(checkpoint), data)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"--from {path}: no model there: name a run, a checkpoint, an export or a converted model"
        )
    return Origin(path.resolve(), path.resolve(), read_config(path))


def origin_of(config: TrainConfig, run: RunFolder, *, resumed: bool) -> Origin | None:
    """Where the model of a run with `--from` is built from; None for a run that starts from random weights.

    A resumed run has all in its own checkpoint, but for the frozen weights of a run with adapters.
    """
    if config.from_ is None:
        return None
    own = run.last_checkpoint() if resumed and not config.lora.rank else None
    return open_origin(config.from_, verified=False) if own is None else Origin(own, run.tokenizer, read_config(own))


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model that can be trained.

    Raises:
        CheckpointError: for other models and damaged files.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        kind = values.get("model_type")
        if "quantization_config" in values or values.get("expert_bits") is not None:
            raise CheckpointError(f"{folder} holds quantised weights, which cannot be trained")
        if kind == MODEL_TYPE:
            return relufied_config(values)
        if kind == RemoeConfig.model_type:
            return RemoeConfig.from_pretrained(folder)
    except RemoeError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is missing or damaged ({' '.join(str(error).split())[:300]})") from error
    raise CheckpointError(
        f"{folder} holds a model of type {kind!r}, not one of this package: `remoe convert` makes one of it"
    )


def _router_tensors(shape: RemoeConfig, options: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        sizes = (shape.hidden_size, shape.experts_per_layer, shape.active_per_token)
        router = build_router(shape.router, *sizes, **options)
    return {name: value.shape for name, value in router.state_dict().items()}


def shape_of_relufied(config: PreTrainedConfig) -> RemoeConfig:
    """The sizes of a relufied model as if each of its layers were a mixture of experts."""
    text, settings = config.get_text_config(), config.relufied

    def first(*names: str) -> Any:
        return next((found for name in names if (found := getattr(text, name, None)) is not None), None)

    shared = first("shared_expert_intermediate_size") or 0
    return RemoeConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=first("moe_intermediate_size", "intermediate_size"),
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=first("num_key_value_heads", "num_attention_heads"),
        head_dim=first("head_dim"),
        max_position_embeddings=first("max_position_embeddings") or 2048,
        tie_word_embeddings=bool(first("tie_word_embeddings")),
        initializer_range=first("initializer_range") or 0.02,
        num_experts=settings["num_experts"],
        num_experts_per_tok=settings["k"],
        router_options={"bias": True, "load_balance": settings["load_balance"]},
        shared_expert_size=shared,
        sparsity=STEERING,
    )


@torch.no_grad()
def _steer(model: RelufiedMixin, config: TrainConfig) -> None:
    """Gives a relufied model a controller with the options of the run and the state of the old one."""
    old, options = model.sparsity, config.model
    model.sparsity = SparsityController.of(
        old.layers,
        **vars(config.sparsity),
        regularizer_normalization=options.regularizer_normalization,
        router_aux_loss_coef=options.router_aux_loss_coef,
    ).to(old.lam.device)
    model.sparsity.load_state_dict(old.state_dict())
