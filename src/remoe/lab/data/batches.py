"""Batches of tokens: shuffled windows for training; for validation, each domain once and in order.

Shape suffixes: B batch, S sequence, N windows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from remoe.errors import ConfigError, DataError
from remoe.lab.data.dataset import Split, check_ids
from remoe.lab.data.manifest import Shard
from remoe.lab.data.permutation import KeyedPermutation

IGNORED_TARGET = -100  # which torch's cross entropy ignores
# Up to so many windows, an epoch's order is an array (128 MiB, made in about a second), as in version 0.1.0, whose runs
# keep their order; for more, it is computed as it is used.
HELD_WINDOWS = 2**24


class TrainBatches:
    """Shuffled training windows; `batch(step)` depends on the seed and the step alone.

    A window is `seq_len` + 1 consecutive tokens of one shard, for `seq_len` predictions; windows start every
    `seq_len` tokens. Each epoch visits every window once, in a different order, and a batch may span two epochs. The
    order of up to HELD_WINDOWS windows is held in memory; that of more is a `KeyedPermutation`, which takes none.
    Raises DataError if the split is too small for one window.
    """

    def __init__(self, split: Split, seq_len: int, batch_size: int, seed: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise ConfigError(f"sequence length and batch size must be positive, not {seq_len} and {batch_size}")
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        counts = [max(shard.num_tokens - 1, 0) // seq_len for shard in split.shards]
        self._first_window = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        if self.windows_per_epoch == 0:
            raise DataError(
                f"{split.path}: the {split.name} split has {split.num_tokens} tokens, too few for one"
                f" window of {seq_len} + 1"
            )
        self._order: tuple[int, np.ndarray | KeyedPermutation] = (-1, np.empty(0, np.int64))

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows in an epoch."""
        return int(self._first_window[-1])

    def batch(self, step: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The batch of a step, counted from 0: int64 (B, S + 1), whose targets are its inputs shifted by one.

        With `rows`, only the rows with these numbers, of which each is the same whoever asks for it; no others are
        read, so that each rank of several reads its own part of a batch. Raises ConfigError for a row that the batch
        does not have, and DataError, which names the shard, for an id outside of the vocabulary.
        """
        places = self._places(step, rows)
        tokens_BS = np.empty((len(places), self.seq_len + 1), np.int64)
        for i, (shard, start) in enumerate(places):
            tokens_BS[i] = shard.tokens[start : start + self.seq_len + 1]
            check_ids(shard, start, tokens_BS[i], self.split.vocab_size)
        return torch.from_numpy(tokens_BS)

    def target_mask(self, step: int, rows: Sequence[int] | None = None) -> torch.Tensor | None:
        """Which targets of `batch(step, rows)` count in the loss: bool (B, S); None where all do."""
        if not self.split.masked:
            return None
        targets = [shard.targets[start + 1 : start + self.seq_len + 1] for shard, start in self._places(step, rows)]
        return torch.from_numpy(np.stack(targets).astype(bool))

    def _places(self, step: int, rows: Sequence[int] | None) -> list[tuple[Shard, int]]:
        """The shard and the first token of each window of a batch."""
        sequence_B = sequence_numbers(step, self.batch_size, rows)
        places = []
        for window in in_epochs(sequence_B, self.windows_per_epoch, self._epoch_order):
            number = int(np.searchsorted(self._first_window, window, side="right")) - 1
            start = (int(window) - int(self._first_window[number])) * self.seq_len
            places.append((self.split.shards[number], start))
        return places

    def _epoch_order(self, epoch: int) -> np.ndarray | KeyedPermutation:
        # a cache; the order is a pure function of seed and epoch
        if self._order[0] != epoch:
            if self.windows_per_epoch > HELD_WINDOWS:
                self._order = (epoch, KeyedPermutation(self.windows_per_epoch, self.seed, epoch))
            else:
                generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
                self._order = (epoch, generator.permutation(self.windows_per_epoch))
        return self._order[1]


def sequence_numbers(step: int, batch_size: int, rows: Sequence[int] | None = None) -> np.ndarray:
    """int64 (B): numbers, counted over the whole run, of the sequences in all or some rows of a step's batch.

    Raises ConfigError for a row that the batch does not have.
    """
    rows = range(batch_size) if rows is None else rows
    if any(not 0 <= row < batch_size for row in (*rows[:1], *rows[-1:])):
        raise ConfigError(f"a batch of {batch_size} rows has no rows {rows}")
    return step * batch_size + np.array(rows, np.int64)


def in_epochs(number_B: np.ndarray, count: int, order: Callable[[int], np.ndarray | KeyedPermutation]) -> np.ndarray:
    """int64 (B): the items with these numbers, of `count` items that are read in `order(epoch)` epoch after epoch."""
    epoch_B, place_B = np.divmod(number_B, count)
    item_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
        item_B[epoch_B == epoch] = order(int(epoch))[place_B[epoch_B == epoch]]
    return item_B


def document_runs(shard: Shard, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First tokens and ends (int64) of the runs in which neighbours among a shard's `documents` follow each other."""
    starts, ends = shard.document_offsets[documents], shard.document_offsets[documents + 1]
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    return starts[np.concatenate([[0], breaks])], ends[np.concatenate([breaks, [len(documents)]]) - 1]


def windows_of(
    tokens_T: np.ndarray, seq_len: int, target_T: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets (int64) and mask (bool), (N, S) each, of consecutive tokens; the last window is padded.

    Where the mask is False, the input is padding (0) and the target is -100. `target_T` is as what each token is
    predicted, where that is not the token itself.
    """
    target_T = tokens_T if target_T is None else target_T
    predictions = len(tokens_T) - 1
    rows = -(-predictions // seq_len)
    input_NS = np.zeros((rows, seq_len), np.int64)
    target_NS = np.full((rows, seq_len), IGNORED_TARGET, np.int64)
    mask_NS = np.zeros((rows, seq_len), bool)
    input_NS.reshape(-1)[:predictions] = tokens_T[:-1]
    target_NS.reshape(-1)[:predictions] = target_T[1:]
    mask_NS.reshape(-1)[:predictions] = True
    return torch.from_numpy(input_NS), torch.from_numpy(target_NS), torch.from_numpy(mask_NS)


class ValidationWindows:
    """Validation windows: the documents of each domain, joined in order and cut into windows of `seq_len` inputs.

    Every token of a domain except its first is predicted exactly once. The last window is padded.
    """

    def __init__(self, split: Split, seq_len: int) -> None:
        if seq_len < 1:
            raise ConfigError(f"sequence length must be positive, not {seq_len}")
        self.split = split
        self.seq_len = seq_len

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that have documents in this split."""
        return tuple(self.split.record.domains)

    def num_predictions(self, domain: str, max_tokens: int | None = None) -> int:
        """Number of targets in `batches` with the same arguments."""
        return sum(end - start for _, start, end in self._runs(domain, max_tokens)) - 1

    def shares(self, max_tokens: int | None) -> dict[str, int | None]:
        """About `max_tokens` divided among the domains in proportion to their sizes; None means everything."""
        if max_tokens is None:
            return dict.fromkeys(self.domains)
        size = {domain: self.num_predictions(domain) for domain in self.domains}
        return {domain: max(1, max_tokens * size[domain] // sum(size.values())) for domain in self.domains}

    def bytes(self, domain: str, max_tokens: int | None = None) -> int:
        """UTF-8 bytes of the documents that `batches` reads with the same `max_tokens`.

        Bits per byte is the summed loss of those targets, in bits, divided by this. The domain's first token is
        not predicted, but its few bytes are counted.
        """
        spans = self._document_spans(domain, max_tokens)
        return sum(int(self.split.shards[shard].document_bytes[documents].sum()) for shard, documents in spans)

    def batches(
        self, domain: str, batch_size: int, max_tokens: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield inputs int64 (N, S), targets int64 (N, S) and mask bool (N, S), N at most `batch_size`.

        Where the mask is False, the input is padding (0) and the target is -100; so is a target outside of the answers
        of conversations, where the split has these. With `max_tokens`, only the first
        whole documents that together have at most that many tokens, but at least one document. Raises DataError
        for a domain that the split does not have, and one that names the shard for an id outside of the vocabulary.
        """
        size = batch_size * self.seq_len
        pending = np.empty((2, 0), np.int64)  # tokens, and as what they are predicted
        for shard, start, end in self._runs(domain, max_tokens):
            while start < end:
                stop = min(start + size + 1 - pending.shape[1], end)
                tokens_T = shard.tokens[start:stop].astype(np.int64)
                check_ids(shard, start, tokens_T, self.split.vocab_size)
                target_T = np.where(shard.targets[start:stop], tokens_T, IGNORED_TARGET) if shard.masked else tokens_T
                pending = np.concatenate([pending, np.stack([tokens_T, target_T])], axis=1)
                start = stop
                if pending.shape[1] == size + 1:
                    yield windows_of(pending[0], self.seq_len, pending[1])
                    pending = pending[:, -1:]
        if pending.shape[1] > 1:
            yield windows_of(pending[0], self.seq_len, pending[1])

    def _runs(self, domain: str, max_tokens: int | None) -> Iterator[tuple[Shard, int, int]]:
        """Where the domain's tokens are, in order: shard, first token and end; neighbouring documents share a run."""
        for number, documents in self._document_spans(domain, max_tokens):
            shard = self.split.shards[number]
            for start, end in zip(*document_runs(shard, documents), strict=True):
                yield shard, int(start), int(end)

    def _document_spans(self, domain: str, max_tokens: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """Shard number and document numbers (int64) of the domain, up to `max_tokens`."""
        if domain not in self.split.record.domains:
            known = ", ".join(self.domains)
            raise DataError(f"{self.split.path}: no domain {domain!r} in {self.split.name} (it has {known})")
        index = self.split.domains.index(domain)
        taken = 0
        for number, shard in enumerate(self.split.shards):
            documents = np.flatnonzero(shard.document_domain == index)
            if not len(documents):
                continue
            lengths = shard.document_offsets[documents + 1] - shard.document_offsets[documents]
            if max_tokens is not None:
                kept = int(np.searchsorted(taken + np.cumsum(lengths), max_tokens, side="right"))
                kept = max(kept, 1) if taken == 0 else kept
                documents, complete = documents[:kept], kept == len(documents)
                taken += int(lengths[:kept].sum())
            if len(documents):
                yield number, documents
            if max_tokens is not None and not complete:
                return
