"""Checkpoints of a model that is spread over ranks: each writes its own file, in a thread, while training goes on.

`start` agrees on which rank writes which block and copies this rank's blocks to the CPU. After every step, `poll` asks
with one small collective whether all ranks have written theirs; then rank 0 adds the checksums and renames the folder.
Until then the folder has a name that is no checkpoint's. Only the main thread calls collectives.
"""

import json
import threading
import time
from collections import ChainMap
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from remoe.lab.files import publish, remove, remove_whole, sync, temporary_name
from remoe.lab.training.checkpoint import (
    OF_RANK_0,
    cannot_write,
    checkpoint_path,
    checkpoint_step,
    clean,
    sha256,
    tokenizer_files,
    training_tensors,
    write_checksums,
    write_info,
)
from remoe.lab.training.config import CheckpointOptions
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.shards import INDEX, MODEL, TRAINING, file_of, held, index_of, key_of, owners, places_of
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM

_POLL_SECONDS = 0.02
_WRITTEN, _WRITING, _FAILED = range(3)


class _Writer(threading.Thread):
    """Writes one rank's file, and computes the checksums of it and of other files."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], others: dict[str, Path]) -> None:
        super().__init__(name="checkpoint")
        self._path, self._tensors, self._others = path, tensors, others
        self.checksums: dict[str, str] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        """Writes."""
        try:
            if self._tensors:
                save_file(self._tensors, self._path)
                sync(self._path)
                self._others[self._path.name] = self._path
            self.checksums = {name: sha256(path) for name, path in self._others.items()}
        except Exception as error:  # raised by `poll`
            self.error = error
        self._tensors = {}


class ShardedSaving:
    """Writes the checkpoints of a run, one at a time. Every rank must call each method, and at the same step.

    Args:
        ranks: those that train the model.
        options: how many checkpoints are kept.
        kept: a step whose checkpoint is kept in any case.
    """

    def __init__(self, ranks: Ranks, options: CheckpointOptions, kept: int | None = None) -> None:
        self._ranks, self._options, self._kept = ranks, options, kept
        self._final: Path | None = None  # while one is being written
        self._writer: _Writer | None = None

    def start(
        self,
        folder: Path,
        step: int,
        model: RemoeForCausalLM,
        optimizer: torch.optim.Optimizer,
        info: dict[str, object],
        course_of_sparsity: list[float],
    ) -> None:
        """Begins to write a checkpoint, when the one before is written; see `save_checkpoint` for the arguments.

        Raises:
            CheckpointError: when this rank cannot write its part of the one before, or rank 0 this one.
            RemoeError: when another rank cannot.
        """
        self.wait()
        ranks, final = self._ranks, checkpoint_path(folder, step)
        partial = _partial(final)
        tied = set(model.all_tied_weights_keys or ())
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        training = training_tensors(model, optimizer, course_of_sparsity)
        mine = held(weights | training)
        if not ranks.first:
            mine = {name: parts for name, parts in mine.items() if name not in OF_RANK_0}
        places = {name: [block for block, _ in parts] for name, parts in mine.items()}
        owner = owners([places_of(text) for text in ranks.gather(json.dumps(places))])
        others: dict[str, Path] = {}
        with ranks.together():
            if ranks.first:
                index = {MODEL: index_of(weights, owner, ranks.count), TRAINING: index_of(training, owner, ranks.count)}
                try:
                    remove_whole(final)  # damaged, otherwise the run would have been resumed from it
                    remove(partial.parent)
                    partial.mkdir(parents=True)
                    _write_config(partial, model)
                    write_info(partial, step, info)
                    (partial / INDEX).write_text(json.dumps(index))
                except OSError as error:
                    raise cannot_write(final, error) from error
                # before any rank writes
                others = {path.name: path for path in partial.iterdir()} | tokenizer_files(folder.parent)
        copies = {
            key_of(name, block): part.detach().to("cpu", copy=True).contiguous()
            for name, parts in mine.items()
            for block, part in parts
            if owner[name][block] == ranks.rank
        }
        self._final, self._writer = final, _Writer(partial / file_of(ranks.rank, ranks.count), copies, others)
        self._writer.start()

    def poll(self) -> None:
        """Finishes the checkpoint that is being written, if there is one and every rank has written its part.

        Raises:
            CheckpointError: when this rank cannot write its part.
            RemoeError: when another rank cannot.
        """
        if self._writer is None:
            return
        writer, final, ranks = self._writer, self._final, self._ranks
        state = _WRITING if writer.is_alive() else _FAILED if writer.error else _WRITTEN
        state = ranks.agree(state) or _WRITTEN
        if state == _WRITING:
            return
        writer.join()
        self._final = self._writer = None
        if state == _FAILED:
            ranks.wait()  # no rank writes any more
            with ranks.together():
                if ranks.first:
                    remove(_partial(final).parent)
                if writer.error:
                    raise cannot_write(final, writer.error, f"rank {ranks.rank}: ") from writer.error
        checksums = [json.loads(text) for text in ranks.gather(json.dumps(writer.checksums))]
        with ranks.together():
            if ranks.first:
                self._finish(final, dict(ChainMap(*checksums)))

    def wait(self) -> None:
        """Returns when no checkpoint is being written any more; raises as `poll` does."""
        while self._writer is not None:
            self.poll()
            time.sleep(_POLL_SECONDS)

    def _finish(self, final: Path, checksums: dict[str, str]) -> None:
        partial = _partial(final)
        try:
            write_checksums(partial, checksums)
            publish(partial, final)
            remove(partial.parent)
        except OSError as error:
            raise cannot_write(final, error) from error
        clean(final.parent, checkpoint_step(final), self._options, self._kept)


def _partial(final: Path) -> Path:
    return final.with_name(temporary_name(final.name)) / final.name


def _write_config(partial: Path, model: RemoeForCausalLM) -> None:
    config = RemoeConfig.from_dict(model.config.to_dict())
    config.architectures = [RemoeForCausalLM.__name__]
    config.dtype = model.dtype
    config.save_pretrained(partial)
    model.generation_config.save_pretrained(partial)
