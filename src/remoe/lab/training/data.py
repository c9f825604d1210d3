"""The data of a run: what its options name, what its model was trained on before, or the standard library."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from remoe.errors import ConfigError
from remoe.lab.data import (
    Dataset,
    MixedBatches,
    PrepareOptions,
    StreamBatches,
    TrainBatches,
    load_tokenizer,
    open_dataset,
    prepare,
    training_batches,
)
from remoe.lab.data.corpus import open_data
from remoe.lab.data.manifest import MANIFEST_NAME
from remoe.lab.data.megatron import find_token_files, open_token_files
from remoe.lab.data.stream import open_stream
from remoe.lab.data.stream_batches import newest_state
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.origin import Origin
from remoe.lab.training.ranks import Ranks


def open_training_data(config: TrainConfig, parent: Path, origin: Origin | None) -> Dataset:
    """What a run is trained on; text and token files are prepared in `parent`/data.

    Args:
        config: options.
        parent: folder.
        origin: the model that is trained further; None for a new one.

    Raises:
        ConfigError: when the options name no data, or contradict it.
        DataError: when there is no such data, it cannot be prepared, or another tokenizer made it.
    """
    if origin:
        return _open_for(origin, config, parent)
    if config.stream:
        if not config.data:
            raise ConfigError("--stream: name with --data the text to be read")
        return _open_streamed(config, parent, config.tokenizer)
    if config.data:
        return open_data(config.data, parent, config.vocab_size, config.tokenizer)
    if config.tokenizer:
        raise ConfigError("--tokenizer is for token files of Megatron: name them with --data")
    return default_dataset(parent, config.vocab_size)


def _open_for(origin: Origin, config: TrainConfig, parent: Path) -> Dataset:
    """The data, by default those that the model was trained on; raises DataError when another tokenizer made them."""
    if not (data := config.data or origin.data):
        raise ConfigError(
            f"--from {origin.folder}: say with --data on what to train it; `remoe data prepare TEXT --out DATA "
            f"--tokenizer {shlex.quote(str(origin.tokenizer))}` prepares text for it"
        )
    if config.stream:
        dataset = _open_streamed(replace(config, data=data), parent, config.tokenizer or origin.tokenizer)
    elif files := find_token_files(data):
        dataset = open_token_files(files, parent, config.tokenizer or origin.tokenizer)
    else:
        dataset = open_dataset(data, tokenizer=origin.tokenizer)
    dataset.check_tokenizer(load_tokenizer(origin.tokenizer), str(origin.folder))
    return dataset


def _open_streamed(config: TrainConfig, parent: Path, tokenizer: str | Path | None) -> Dataset:
    """The dataset that --stream names: text, or what an earlier run with that text wrote."""
    if not (Path(config.data) / MANIFEST_NAME).exists():
        return open_stream(config.data, config.text_column, parent, tokenizer)
    dataset = open_dataset(config.data)
    if not dataset.streamed:
        raise ConfigError(f"--stream: {config.data} is a prepared dataset, which is read without it")
    return dataset


def batches_of(dataset: Dataset, config: TrainConfig) -> TrainBatches | MixedBatches | StreamBatches:
    """The training batches of a run; raises ConfigError and DataError for what does not fit the data."""
    order = config.seq_len, config.batch_size, config.seed
    if not dataset.streamed:
        return training_batches(dataset.train, *order, config.domain_weights)
    if config.domain_weights:
        raise ConfigError(f"--domain-weights: {dataset.path} is read as a stream, of which no domains are known")
    return StreamBatches(dataset, *order)


def state_of(batches: TrainBatches | MixedBatches | StreamBatches, ranks: Ranks) -> dict[str, object]:
    """What a checkpoint has of the batches: the place in a stream, otherwise nothing. Every rank must call this."""
    if not isinstance(batches, StreamBatches):
        return {}
    states = ranks.gather(json.dumps(batches.state()))
    return {"stream": newest_state([json.loads(state) for state in states])}


def default_dataset(parent: Path, vocab_size: int, *, wait: bool = False) -> Dataset:
    """The standard library of the running Python, prepared once in `parent`/data.

    Args:
        parent: folder.
        vocab_size: of the tokenizer that is trained for it.
        wait: whether to wait for another process that prepares it, instead of raising DataError.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    out = parent / "data" / f"stdlib-{version}-bpe{vocab_size}"
    if (out / MANIFEST_NAME).exists():  # even if the library has changed since
        return open_dataset(out)
    prepare(PrepareOptions(sources=("stdlib",), out=out, vocab_size=vocab_size, validation_fraction=0.05), wait=wait)
    return open_dataset(out)
