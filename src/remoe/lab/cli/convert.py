"""`remoe convert upcycle | relufy | megatron`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import importing, parse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remoe.lab.data import Dataset

LONGEST_SAMPLE = 512  # tokens of a sequence
DEFAULT_SAMPLE = 16_384  # tokens; less text is read more than once
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]


@dataclass
class UpcycleOptions:
    """Convert a dense model into a ReLU-routed mixture of experts with the same logits.

    Fine-tune the result with `remoe train --from DIR --data DATA`, or with transformers' Trainer and
    `callbacks=[remoe.SparsityCallback()]`.
    """

    source: Source
    """The dense model: a folder or a name on the Hugging Face hub; llama, mistral, qwen2 or qwen3."""
    out: Out
    """New or empty folder to write to: weights, tokenizer, and the code with which transformers loads it."""
    num_experts: int = 8
    """Number of experts E per layer, before the split by granularity."""
    k: int = 1
    """Target number of active experts per token, on average, before the split by granularity."""
    granularity: int = 1
    """Split each expert into this many narrower ones."""
    data: str | None = None
    """Folder written by `remoe data prepare --tokenizer SOURCE` from text like that which the model will read. With it
    the routers start at the target sparsity, without it only near it."""
    sample_tokens: int = DEFAULT_SAMPLE
    """Tokens of --data to use."""


@dataclass
class RelufyOptions:
    """Replace the top-k routers of a mixture of experts by ReLU routers, fitted to them on sample text.

    All other weights stay unchanged. Fine-tune the result with `remoe train --from DIR --data DATA`, or with
    transformers' Trainer and `callbacks=[remoe.SparsityCallback()]`.
    """

    source: Source
    """The mixture of experts: a folder, a name on the Hugging Face hub, or a run of `remoe train`."""
    out: Out
    """New or empty folder to write to; `remoe.load_relufied` loads it. For a model of this package it is a folder like
    that of `remoe export`."""
    data: str
    """Folder written by `remoe data prepare --tokenizer SOURCE` (for a run: --tokenizer RUN/tokenizer) from text like
    that which the model reads."""
    sample_tokens: int = DEFAULT_SAMPLE
    """Tokens of --data to use. The fit uses at most 16,384 of them, the loss all."""
    max_loss_increase: float = 0.1
    """The most by which the loss on the sample may rise, in nats per token; beyond it nothing is written."""


@dataclass
class MegatronOptions:
    """Convert a checkpoint of the authors' code (thu-ml/ReMoE, a fork of Megatron-LM); no code in it is executed."""

    source: Source
    """Folder that was given to Megatron's `--save`, or an `iter_...` folder in it."""
    out: Out
    """New or empty folder to write to: weights, and the code with which transformers loads them."""
    iteration: int | None = None
    """Iteration to convert; the newest by default."""
    tokenizer: str | None = None
    """Tokenizer to copy into the folder: a folder or a name on the Hugging Face hub."""


def upcycle_command(argv: list[str]) -> int:
    """Writes the folder and prints what is in it."""
    options = parse(UpcycleOptions, argv, prog="remoe convert upcycle")
    out = _new_folder(options.out)
    dataset = _dataset(options) if options.data else None

    import remoe

    dense, tokenizer = _open(options.source)
    samples = _samples(dataset, tokenizer, options.sample_tokens, dense, options.source) if dataset else ()
    model = remoe.upcycle(dense, options.num_experts, options.k, options.granularity, samples=samples)
    _write(model, tokenizer, out)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, model))
    print(f"{before / 1e6:,.1f}M parameters became {after / 1e6:,.1f}M; the logits are unchanged")
    _say(model, out, options.data)
    return 0


def relufy_command(argv: list[str]) -> int:
    """Writes the folder and prints how close the new gates are to the old ones."""
    options = parse(RelufyOptions, argv, prog="remoe convert relufy")
    out = _new_folder(options.out)
    dataset = _dataset(options)

    import remoe

    model, tokenizer = _open(options.source)
    samples = _samples(dataset, tokenizer, options.sample_tokens, model, options.source)
    print(remoe.relufy(model, samples, max_loss_increase=options.max_loss_increase))
    _write(model, tokenizer, out)
    _say(model, out, options.data)
    return 0


def megatron_command(argv: list[str]) -> int:
    """Writes the folder and prints how to use it."""
    options = parse(MegatronOptions, argv, prog="remoe convert megatron")
    out = _new_folder(options.out)

    with importing():
        import remoe
        from remoe.lab.data import load_tokenizer
        from remoe.lab.data.tokenizer import vocabulary_size

    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    model = remoe.load_megatron(options.source, options.iteration)
    known, tokens = model.config.vocab_size, 0 if tokenizer is None else vocabulary_size(tokenizer)
    if tokens > known:
        raise ConfigError(f"tokenizer {options.tokenizer} has {tokens:,} tokens, the model {known:,}")
    _write(model, tokenizer, out)
    if tokenizer is None:
        print(f"wrote        {out}, without a tokenizer: other commands need one")
    else:
        _say(model, out, None)
    return 0


def _new_folder(name: str) -> Path:
    from remoe.lab.files import check_new_folder

    out = Path(name)
    check_new_folder(out)  # checked before the work, not after it
    return out


def _dataset(options: UpcycleOptions | RelufyOptions) -> "Dataset":
    from remoe.lab.data import open_dataset
    from remoe.lab.training.folder import RunFolder

    if options.sample_tokens < 2:
        raise ConfigError(f"--sample-tokens must be at least 2, but is {options.sample_tokens}")
    run = RunFolder(options.source)
    dataset = open_dataset(options.data, tokenizer=run.tokenizer if run.tokenizer.is_dir() else options.source)
    if options.sample_tokens > max(dataset.train.num_tokens, DEFAULT_SAMPLE):
        raise ConfigError(
            f"--sample-tokens {options.sample_tokens:,} is more than {options.data} has: "
            f"{dataset.train.num_tokens:,} training tokens"
        )
    return dataset


def _open(source: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model and its tokenizer; a source that does not exist here is a name on the Hugging Face hub."""
    with importing():
        from remoe.lab.training.load import load_model

    if not Path(source).exists():
        print(f"{source} is not a folder here: looking on the Hugging Face hub", flush=True)
    model, tokenizer, _ = load_model(source, hub=True)
    return model, tokenizer


def _samples(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", count: int, model: "PreTrainedModel", source: str
) -> list["Tensor"]:
    """About `count` training tokens, in sequences from all over the data."""
    from remoe.lab.data import TrainBatches
    from remoe.models.context import longest_sequence

    dataset.check_tokenizer(tokenizer, source)
    length = min(LONGEST_SAMPLE, longest_sequence(model) or LONGEST_SAMPLE, count)
    batches = TrainBatches(dataset.train, length, 1, seed=0)
    return [batches.batch(step)[:, :-1] for step in range(count // length)]


def _write(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", out: Path) -> None:
    from remoe.lab.export import export_model
    from remoe.lab.files import new_folder
    from remoe.models.modeling_remoe import RemoeForCausalLM

    with new_folder(out) as folder:
        if isinstance(model, RemoeForCausalLM):
            export_model(model, folder)
        else:
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _say(model: "PreTrainedModel", out: Path, data: str | None) -> None:
    from remoe.models.modeling_remoe import RemoeForCausalLM

    print(f"wrote        {out}")
    path, on = shlex.quote(str(out)), shlex.quote(data or "DATA")
    if isinstance(model, RemoeForCausalLM):
        print(f"next         remoe eval {path} --data {on}\n             remoe report {path} --data {on}")
    else:
        print(f"next         remoe.load_relufied({str(out)!r})\n             remoe generate {path}")
    print(f"train it     remoe train --from {path} --data {on}")
