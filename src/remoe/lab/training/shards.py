"""The tensors of a checkpoint: in two safetensors files, or, of a run on several ranks, in one file for each rank.

`shards.json` lists the blocks of each tensor, each written by one of the ranks that hold it:

    {"model": {NAME: {"dtype": "float32", "shape": [4, 8], "blocks": [[FILE, KEY, [[0, 2], [0, 8]]], ...]}, ...},
     "training": {...}}

FILE is a file of the checkpoint, KEY the name of the block in it. Its start and end in every dimension follow. "model"
has what the model's `state_dict` has, "training" the optimiser's moments and the rest.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from remoe.errors import CheckpointError
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.deferred import Deferred, allocate
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.sharding import Block, blocks, local, shard_of

INDEX = "shards.json"
MODEL, TRAINING = "model", "training"
Held = dict[str, list[tuple[Block, Tensor]]]  # the blocks of each tensor that a rank holds


def file_of(rank: int, count: int) -> str:
    """The name of a rank's file, of `count` ranks."""
    return f"shard-{rank:05d}-of-{count:05d}.safetensors"


def key_of(name: str, block: Block) -> str:
    """The name of a block in its file."""
    return f"{name}:{','.join(str(start) for start, _ in block)}"


def held(tensors: dict[str, Tensor]) -> Held:
    """What this rank holds of some tensors."""
    return {name: blocks(tensor) for name, tensor in tensors.items()}


def places_of(text: str) -> dict[str, list[Block]]:
    """The blocks of each tensor, by name, from JSON."""
    return {
        name: [tuple((start, stop) for start, stop in block) for block in listed]
        for name, listed in json.loads(text).items()
    }


def owners(held_by_ranks: list[dict[str, list[Block]]]) -> dict[str, dict[Block, int]]:
    """Which rank writes each block of each tensor: of those that hold it, the one with the fewest numbers so far."""
    numbers = [0] * len(held_by_ranks)
    owner: dict[str, dict[Block, int]] = {}
    for name in {name: None for held_by_rank in held_by_ranks for name in held_by_rank}:
        holders = defaultdict(list)
        for rank, held_by_rank in enumerate(held_by_ranks):
            for block in held_by_rank.get(name, ()):
                holders[block].append(rank)
        owner[name] = {}
        for block, ranks in holders.items():
            owner[name][block] = least = min(ranks, key=numbers.__getitem__)
            numbers[least] += math.prod(stop - start for start, stop in block)
    return owner


def index_of(tensors: dict[str, Tensor], owner: dict[str, dict[Block, int]], count: int) -> dict[str, object]:
    """The entries of tensors in `shards.json`, when `count` ranks write them."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "blocks": [[file_of(rank, count), key_of(name, block), block] for block, rank in owner[name].items()],
        }
        for name, tensor in tensors.items()
    }


@dataclass
class Stored:
    """A tensor in a checkpoint, which is read in slices: only what is asked for.

    Attributes:
        shape, dtype: of the whole tensor.
        blocks: the opened file, the name in it, and the place in the whole tensor, of each of its blocks.
    """

    shape: list[int]
    dtype: torch.dtype
    blocks: list[tuple[safe_open, str, Block]]

    def get_shape(self) -> list[int]:
        """Its size in every dimension."""
        return self.shape

    def __getitem__(self, slices) -> Tensor:
        """The part that slices select, one for each dimension; `...` for all of it."""
        slices = (slice(None),) * len(self.shape) if slices is Ellipsis else slices
        asked = [part.indices(size)[:2] for part, size in zip(slices, self.shape, strict=True)]
        out = torch.empty([max(stop - start, 0) for start, stop in asked], dtype=self.dtype)
        found = 0
        for file, key, block in self.blocks:
            both = [(max(a, b), min(c, d)) for (a, c), (b, d) in zip(asked, block, strict=True)]
            if any(stop <= start for start, stop in both):
                continue
            stored = file.get_slice(key)
            if stored.get_shape() != [stop - start for start, stop in block]:
                raise ValueError(f"{key} has another shape than {INDEX} says")
            there = tuple(slice(start - at, stop - at) for (start, stop), (at, _) in zip(both, block, strict=True))
            here = tuple(slice(start - at, stop - at) for (start, stop), (at, _) in zip(both, asked, strict=True))
            # safetensors does not slice a tensor without dimensions
            out[here] = stored[there] if there else file.get_tensor(key)
            found += math.prod(stop - start for start, stop in both)
        if found != out.numel():
            raise ValueError(f"blocks are missing that {INDEX} should list")
        return out


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Stored], dict[str, Stored]]]:
    """Context with the tensors of a checkpoint by their names, as they are stored: the model's, and the others.

    Raises:
        OSError, SafetensorError, ValueError, KeyError, TypeError: when it cannot be read.
    """
    with ExitStack() as files:
        index = path / INDEX
        if index.exists():
            listed = json.loads(index.read_text())
            yield tuple(_from_index(path, listed[part], files) for part in (MODEL, TRAINING))
        else:
            parts = sorted(path.glob("model*.safetensors")), [path / "training.safetensors"]
            yield tuple(_from_files(part, files) for part in parts)


@contextmanager
def opened_weights(path: Path) -> Iterator[dict[str, Stored]]:
    """Context with the tensors of a model by their names, in a checkpoint or any folder of safetensors files.

    Raises:
        OSError, SafetensorError, ValueError, KeyError, TypeError: when they cannot be read.
    """
    with ExitStack() as files:
        index = path / INDEX
        if index.exists():
            yield _from_index(path, json.loads(index.read_text())[MODEL], files)
        else:
            yield _from_files(sorted(path.glob("model*.safetensors")), files)


def _from_index(path: Path, listed: dict, files: ExitStack) -> dict[str, Stored]:
    handles: dict[str, safe_open] = {}
    stored = {}
    for name, entry in listed.items():
        places = []
        for file, key, block in entry["blocks"]:
            if file not in handles:
                handles[file] = files.enter_context(safe_open(path / file, framework="pt"))
            places.append((handles[file], key, tuple((start, stop) for start, stop in block)))
        stored[name] = Stored(entry["shape"], getattr(torch, entry["dtype"]), places)
    return stored


def _from_files(paths: list[Path], files: ExitStack) -> dict[str, Stored]:
    stored = {}
    for path in paths:
        file = files.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 - it is no dict
            part = file.get_slice(name)
            shape = part.get_shape()
            whole = tuple((0, size) for size in shape)
            some = part[(slice(0, 1),) * len(shape)] if shape else file.get_tensor(name)
            stored[name] = Stored(shape, some.dtype, [(file, name, whole)])
    return stored


def model_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights; none when there are none.

    Raises:
        CheckpointError: when `shards.json` is damaged.
    """
    index = path / INDEX
    if not index.exists():
        return sorted(path.glob("model*.safetensors"))
    try:
        listed = json.loads(index.read_text())
        parts = (listed[part].values() for part in (MODEL, TRAINING))
        return [path / name for name in sorted({file for e in chain(*parts) for file, *_ in e["blocks"]})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error})") from error


def fill(model: nn.Module, weights: dict[str, Stored], path: Path) -> None:
    """Copies stored weights and buffers into a model, which may be sharded; each rank reads its own parts.

    Raises:
        CheckpointError: when the tensors are not those of the model.
    """
    own, tied = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = [name for name in own if name not in weights and name not in tied]
    wrong += [name for name in weights if name not in own or weights[name].shape != list(own[name].shape)]
    if wrong:
        raise CheckpointError(f"checkpoint {path} does not fit the model: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, stored in weights.items():
            local(own[name]).copy_(shard_of(stored, own[name]))


def read_model(path: Path, config: RemoeConfig | None = None) -> RemoeForCausalLM:
    """The model of a checkpoint of a run, whole in this process, on the CPU; a tensor at a time.

    Args:
        path: the checkpoint.
        config: of the model, instead of the checkpoint's own; of the same sizes.

    Raises:
        CheckpointError: when it cannot be read.
    """
    try:
        if not (path / INDEX).exists():
            return RemoeForCausalLM.from_pretrained(path, config=config)
        with torch.random.fork_rng(devices=[]), Deferred(draw=False):
            model = RemoeForCausalLM(config or RemoeConfig.from_pretrained(path))
        allocate(model, torch.device("cpu"))
        with opened_weights(path) as weights:
            fill(model, weights, path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {path}: {' '.join(str(error).split())[:300]}") from error
    return model
