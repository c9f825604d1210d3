"""`remoe convert upcycle | relufy | megatron`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.cli.parsing import parse
from remoe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]


@dataclass
class UpcycleOptions:
    """Make a mixture with ReLU routing of a dense model: the same logits, and experts to be trained beside its layers.

    Fine-tune it with transformers' Trainer and `callbacks=[remoe.SparsityCallback()]`.
    """

    source: Source
    """The dense model: a folder or a name on the hub, of type llama, mistral, qwen2 or qwen3."""
    out: Out
    """Folder to write, a new or empty one: weights, tokenizer, and the code by which plain transformers loads it."""
    num_experts: int = 8
    """E, experts of each layer."""
    k: int = 1
    """Experts that a token shall have in the mean."""
    granularity: int = 1
    """G: each expert is cut into G narrower ones."""
    data: str | None = None
    """Folder written by `remoe data prepare --tokenizer SOURCE`: with text of the kind that the model is for, the
    routers start at the wanted sparsity; without, near it."""
    sample_tokens: int = 16_384
    """So many tokens of that text."""


@dataclass
class RelufyOptions:
    """Turn the TopK routers of a mixture into ReLU routers, fitted on sample text; all else stays as it is.

    Fine-tune it with transformers' Trainer and `callbacks=[remoe.SparsityCallback()]`.
    """

    source: Source
    """The mixture: a folder, a name on the hub, or a run of `remoe train`."""
    out: Out
    """Folder to write, a new or empty one. `remoe.load_relufied` loads it, or what loads a run where SOURCE is one."""
    data: str
    """Folder written by `remoe data prepare --tokenizer SOURCE`: text of the kind that the model is for."""
    sample_tokens: int = 16_384
    """So many tokens of that text."""
    max_loss_increase: float = 0.1
    """By how much the loss of the sample may rise, nats per token; more is refused, and nothing written."""


@dataclass
class MegatronOptions:
    """Read a checkpoint of the authors' code (thu-ml/ReMoE, a fork of Megatron-LM), without running anything in it."""

    source: Source
    """What their `--save` named, or an `iter_...` folder in it."""
    out: Out
    """Folder to write, a new or empty one: weights, and the code by which plain transformers loads them."""
    iteration: int | None = None
    """Which one; the newest by default."""
    tokenizer: str | None = None
    """A tokenizer to put beside it: a folder or a name on the hub."""


def upcycle_command(argv: list[str]) -> int:
    """Writes the folder and says what is in it."""
    options = parse(UpcycleOptions, argv, prog="remoe convert upcycle")
    out = _new_folder(options.out)

    import remoe

    dense, tokenizer = _open(options.source)
    samples = _samples(options.data, tokenizer, options.sample_tokens, dense) if options.data else ()
    model = remoe.upcycle(dense, options.num_experts, options.k, options.granularity, samples=samples)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, model))
    ours = _write(model, tokenizer, out)
    print(f"{before / 1e6:,.1f}M parameters became {after / 1e6:,.1f}M, with the logits that they had")
    return _say(out, options.data, ours)


def relufy_command(argv: list[str]) -> int:
    """Writes the folder and says how near the new gates are to the old ones."""
    options = parse(RelufyOptions, argv, prog="remoe convert relufy")
    out = _new_folder(options.out)

    import remoe

    model, tokenizer = _open(options.source)
    samples = _samples(options.data, tokenizer, options.sample_tokens, model)
    print(remoe.relufy(model, samples, max_loss_increase=options.max_loss_increase))
    return _say(out, options.data, _write(model, tokenizer, out))


def megatron_command(argv: list[str]) -> int:
    """Writes the folder and says how to load it."""
    options = parse(MegatronOptions, argv, prog="remoe convert megatron")
    out = _new_folder(options.out)

    import remoe
    from remoe.data import load_tokenizer

    model = remoe.load_megatron(options.source, options.iteration)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    return _say(out, None, _write(model, tokenizer, out))


def _new_folder(name: str) -> Path:
    out = Path(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # found out before the work, not after it
        raise ConfigError(f"{out} already exists and is not an empty folder")
    return out


def _open(source: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model and its tokenizer; what is no folder is a name on the hub."""
    from remoe.cli.quiet import quiet_transformers
    from remoe.training.rundir import load_model

    quiet_transformers()
    model, tokenizer, _ = load_model(source, hub=True)
    return model, tokenizer


def _samples(data: str, tokenizer: "PreTrainedTokenizerBase", count: int, model: "PreTrainedModel") -> list["Tensor"]:
    """About `count` training tokens, as windows from all over the data."""
    from remoe.data import TrainBatches, open_dataset, tokenizer_fingerprint

    if count < 2:
        raise ConfigError(f"--sample-tokens must be at least 2, but is {count}")
    dataset = open_dataset(Path(data))
    if dataset.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"{data} was prepared with another tokenizer: remoe data prepare --tokenizer names the model's"
        )
    length = min(512, getattr(model.config, "max_position_embeddings", None) or 512, count)
    batches = TrainBatches(dataset.train, length, 1, seed=0)
    return [batches.batch(step)[:, :-1] for step in range(max(1, count // length))]


def _write(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", out: Path) -> bool:
    """Writes the folder; returns whether the model is one of ours, or a transformers one with our routers."""
    from remoe.export import export_model
    from remoe.models.modeling_remoe import RemoeForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    ours = isinstance(model, RemoeForCausalLM)
    if ours:
        export_model(model, out)
    else:
        model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return ours


def _say(out: Path, data: str | None, ours: bool) -> int:
    print(f"wrote        {out}")
    if ours:
        print(f"next         remoe eval {out} --data {data or 'DATA'}   |   remoe report {out} --data {data or 'DATA'}")
    else:
        print(f"next         remoe.load_relufied({str(out)!r})   |   remoe generate {out}")
    return 0
