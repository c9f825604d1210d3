"""The order that is computed item by item is a shuffle: of every size, of its own for each key, without memory."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from remoe.errors import ConfigError
from remoe.lab.data import TrainBatches, batches
from remoe.lab.data.permutation import KeyedPermutation


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4097, 100_003])
def test_it_is_a_bijection(size: int) -> None:
    found = KeyedPermutation(size, 3, 5)[np.arange(size)]
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_sizes_that_it_cannot_have(size: int) -> None:
    with pytest.raises(ConfigError, match="it must be of 1 to 2"):
        KeyedPermutation(size, 0)


def test_an_item_is_the_same_alone_and_among_others_and_at_the_largest_size() -> None:
    index = np.array([5, 0, 2**62 - 1, 7])
    order = KeyedPermutation(2**62, 1, 2)
    assert [int(order[index[i : i + 1]][0]) for i in range(4)] == order[index].tolist()
    assert index.tolist() == [5, 0, 2**62 - 1, 7]
    assert order[np.empty(0, np.int64)].shape == (0,)


def test_it_never_changes() -> None:
    # runs resume by it; the values are those of the first version
    assert KeyedPermutation(10, 0, 0)[np.arange(10)].tolist() == [5, 3, 6, 9, 1, 0, 4, 2, 8, 7]
    assert KeyedPermutation(5 * 10**9, 7, 1)[np.arange(3)].tolist() == [1899954620, 1281853858, 1307653693]


@pytest.mark.parametrize("size", [4097, 20_000, 65_536])
def test_it_looks_shuffled(size: int) -> None:
    keys = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    orders = [KeyedPermutation(size, *key)[np.arange(size)] for key in keys]
    bound = 5 / np.sqrt(size)  # five standard deviations of the correlation of two random orders
    for i, order in enumerate(orders):
        for lag in (1, 2, 16, 64, 256):
            assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < bound
        for other in (np.arange(size), *orders[:i]):
            assert abs(np.corrcoef(order, other)[0, 1]) < bound
            assert (order == other).sum() < 10  # one on average
        counts, *_ = np.histogram2d(np.arange(size), order, bins=16)
        expected = size / 16**2
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 15**2) < 5 * np.sqrt(2 * 15**2)  # (16 - 1)^2 degrees of freedom


class Numbers:
    """Tokens of a shard without memory: the token at place i is i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.arange(part.start, min(part.stop, self.count))


def test_five_billion_windows_take_no_memory() -> None:
    count = 5 * 10**9
    sizes = [count * 3 // 5, count * 2 // 5]
    shards = tuple(SimpleNamespace(num_tokens=4 * n + 1, tokens=Numbers(4 * n + 1), path="big") for n in sizes)
    split = SimpleNamespace(shards=shards, vocab_size=4 * count, path="big", name="train", num_tokens=4 * count + 2)
    tracemalloc.start()
    big = TrainBatches(split, seq_len=4, batch_size=60, seed=1)
    last = count // 60  # its rows are of two epochs
    rows = {step: big.batch(step) for step in (0, 1, last, last + 1)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23  # most of it is of modules that are loaded; the order would take 40 GB
    assert big.windows_per_epoch == count
    firsts = np.concatenate([row[:, 0].numpy() for row in rows.values()])
    assert (firsts % 4 == 0).all()
    assert len(np.unique(firsts)) > 0.98 * len(firsts)
    assert firsts.max() > 2 * count  # from all over the split
    order = KeyedPermutation(count, 1, 0)[np.arange(60)]
    assert rows[0][:, 0].tolist() == [4 * int(w if w < sizes[0] else w - sizes[0]) for w in order]
    assert (np.diff(rows[0].numpy()) == 1).all()


def test_an_epoch_beyond_what_is_held_visits_every_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = SimpleNamespace(num_tokens=101, tokens=Numbers(101), path="small")
    split = SimpleNamespace(shards=(shard,), vocab_size=101, path="small", name="train", num_tokens=101)
    firsts = []
    for held in (100, 99):
        monkeypatch.setattr(batches, "HELD_WINDOWS", held)
        one = TrainBatches(split, seq_len=1, batch_size=10, seed=1)
        firsts.append([int(token) for step in range(10) for token in one.batch(step)[:, 0]])
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(100))
    assert firsts[0] == np.random.Generator(np.random.PCG64([1, 0])).permutation(100).tolist()  # as in 0.1.0
    assert firsts[1] == KeyedPermutation(100, 1, 0)[np.arange(100)].tolist() != firsts[0]
