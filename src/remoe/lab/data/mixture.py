"""Training batches in which each domain has a given share of the sequences.

Shape suffixes: B batch, S sequence.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import torch

from remoe.errors import ConfigError, DataError
from remoe.lab.data.batches import TrainBatches, document_runs, in_epochs, sequence_numbers
from remoe.lab.data.dataset import Split, check_ids
from remoe.lab.data.manifest import TARGETS
from remoe.lab.data.permutation import KeyedPermutation

CACHED_INDICES = 256  # of a domain in a shard; each takes 16 bytes for each run of the domain's documents


class MixedBatches:
    """Shuffled training windows, each of one domain; the domains' shares are those of their weights.

    A window is `seq_len` + 1 tokens of the domain's documents in one shard, which are joined in order; windows start
    every `seq_len` tokens. Every window of a domain is read once before any is read again, in a different order each
    time. After any number of sequences, each domain's number is its share of them to rounding, see `draw`.

    Args:
        split: the training split.
        seq_len: predictions of a window.
        batch_size: sequences of a step, B.
        seed: with the step, what `batch` depends on.
        weights: by domain; every domain of the split has one, and 0 leaves a domain out.

    Raises:
        ConfigError: for weights of other domains or without positive sum, and sizes that are not positive.
        DataError: for a domain with a weight that has too few tokens for one window in each shard.
    """

    def __init__(self, split: Split, seq_len: int, batch_size: int, seed: int, weights: Mapping[str, float]) -> None:
        if seq_len < 1 or batch_size < 1:
            raise ConfigError(f"sequence length and batch size must be positive, not {seq_len} and {batch_size}")
        self.split, self.seq_len, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self._weights = _checked(weights, split)
        self._first_window: dict[str, np.ndarray] = {}
        for domain in self._weights:
            tokens = [shard.domains[domain].tokens if domain in shard.domains else 0 for shard in split.record.shards]
            counts = [max(count - 1, 0) // seq_len for count in tokens]
            self._first_window[domain] = np.cumsum([0, *counts], dtype=np.int64)
            if self.windows(domain) == 0:
                raise DataError(
                    f"{split.path}: domain {domain!r} has {sum(tokens)} training tokens, and no shard with enough for"
                    f" one window of {seq_len} + 1"
                )
        self._runs = lru_cache(CACHED_INDICES)(self._read_runs)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the sequences of each domain with a positive weight, largest first."""
        whole = sum(self._weights.values())
        return {domain: weight / whole for domain, weight in self._weights.items()}

    def windows(self, domain: str) -> int:
        """Number of windows of a domain."""
        return int(self._first_window[domain][-1])

    def batch(self, step: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The batch of a step, or some rows of it, as `TrainBatches.batch`: int64 (B, S + 1)."""
        return torch.from_numpy(self._filled(step, rows, "tokens"))

    def target_mask(self, step: int, rows: Sequence[int] | None = None) -> torch.Tensor | None:
        """Which targets of a batch count in the loss, as `TrainBatches.target_mask`: bool (B, S), or None."""
        if not self.split.masked:
            return None
        return torch.from_numpy(self._filled(step, rows, TARGETS)[:, 1:].astype(bool))

    def _filled(self, step: int, rows: Sequence[int] | None, name: str) -> np.ndarray:
        """int64 (B, S + 1): what an array of the shards has for the tokens of a batch."""
        drawn = [draw(int(number), self._weights) for number in sequence_numbers(step, self.batch_size, rows)]
        values_BS = np.empty((len(drawn), self.seq_len + 1), np.int64)
        for domain in self._weights:
            row_N = [row for row, (of, _) in enumerate(drawn) if of == domain]
            number_N = np.array([drawn[row][1] for row in row_N], np.int64)
            window_N = in_epochs(number_N, self.windows(domain), partial(self._order, domain))
            for row, window in zip(row_N, window_N, strict=True):
                self._read(domain, int(window), name, values_BS[row])
        return values_BS

    def _order(self, domain: str, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(self.windows(domain), self.seed, epoch, self.split.domains.index(domain))

    def _read(self, domain: str, window: int, name: str, values_S: np.ndarray) -> None:
        """Fills `values_S` with a window of a domain, from the array of this name."""
        first_window = self._first_window[domain]
        number = int(np.searchsorted(first_window, window, side="right")) - 1
        shard = self.split.shards[number]
        starts, before = self._runs(domain, number)
        place = (window - int(first_window[number])) * self.seq_len
        run, filled = int(np.searchsorted(before, place, side="right")) - 1, 0
        while filled < len(values_S):
            start = int(starts[run]) + place + filled - int(before[run])
            taken = min(len(values_S) - filled, int(before[run + 1]) - place - filled)
            part = getattr(shard, name)[start : start + taken]
            if name != TARGETS:
                check_ids(shard, start, part, self.split.vocab_size)
            values_S[filled : filled + taken] = part
            run, filled = run + 1, filled + taken

    def _read_runs(self, domain: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """First token of each run of the domain's documents in a shard, and the domain's tokens before each and all."""
        shard = self.split.shards[number]
        documents = np.flatnonzero(shard.document_domain == self.split.domains.index(domain))
        starts, ends = document_runs(shard, documents)
        return starts, np.concatenate([[0], np.cumsum(ends - starts)])


def training_batches(
    split: Split, seq_len: int, batch_size: int, seed: int, weights: Mapping[str, float]
) -> TrainBatches | MixedBatches:
    """Batches in the proportions of `weights`, or if there are none, of the whole text in one order."""
    if weights:
        return MixedBatches(split, seq_len, batch_size, seed, weights)
    return TrainBatches(split, seq_len, batch_size, seed)


def draw(number: int, weights: Mapping[str, int]) -> tuple[str, int]:
    """The domain of a sequence, and how many of the sequences before it are of that domain.

    Each domain in turn, the heaviest first, takes its share of what the domains before it left, rounded. The counts are
    exact integers and grow with the number of sequences, so they need no state, and each is within (1 + H) / 2 of its
    share, where H is the sum of 1 / i below the number of domains.

    Args:
        number: of the sequence, counted from 0.
        weights: positive, by domain, the largest first.
    """
    rest, next_rest, whole = number, number + 1, sum(weights.values())
    for domain, weight in weights.items():
        taken, next_taken = ((2 * n * weight + whole) // (2 * whole) for n in (rest, next_rest))
        if next_taken > taken:
            return domain, taken
        rest, next_rest, whole = rest - taken, next_rest - next_taken, whole - weight
    raise AssertionError("the last domain takes all that is left")


def _checked(weights: Mapping[str, float], split: Split) -> dict[str, int]:
    """Whole numbers in the proportions of the positive weights, as they are written in decimal, the largest first."""
    present = ", ".join(split.record.domains)
    for domain in weights:
        if domain not in split.record.domains:
            raise ConfigError(f"--domain-weights: no domain {domain!r} in the training text (it has {present})")
    if missing := [domain for domain in split.record.domains if domain not in weights]:
        raise ConfigError(f"--domain-weights: no weight for {', '.join(missing)}; 0 leaves a domain out")
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ConfigError("--domain-weights must be finite and at least 0, and one of them above 0")
    exact = {domain: Fraction(str(weight)) for domain, weight in weights.items() if weight}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    return {domain: int(exact[domain] * scale) for domain in sorted(exact, key=lambda name: (-exact[name], name))}
