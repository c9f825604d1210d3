import numpy as np
import pytest

from remoe.lab.data.permutation import KeyedPermutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_item_has_one_place(size):
    assert sorted(KeyedPermutation(size, 0, 0)(np.arange(size))) == list(range(size))


def test_places_are_independent_of_each_other():
    permutation = KeyedPermutation(1000, 5, 2)
    together = permutation(np.arange(1000))
    assert [int(permutation(np.array([place]))[0]) for place in range(0, 1000, 37)] == together[::37].tolist()


def test_each_key_has_its_own_order():
    orders = {tuple(KeyedPermutation(50, seed, epoch)(np.arange(50))) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_the_order_looks_random():
    size = 300_000
    item_N = KeyedPermutation(size, 1, 0)(np.arange(size))
    for lag in (1, 2, 3, 512, 1024):  # standard deviation of a random order: 0.0018
        assert abs(np.corrcoef(item_N[:-lag], item_N[lag:])[0, 1]) < 0.009
    assert abs(np.corrcoef(item_N, np.arange(size))[0, 1]) < 0.009
    counts, _, _ = np.histogram2d(np.arange(size), item_N, bins=20)
    chi_square = ((counts - size / 400) ** 2 / (size / 400)).sum()
    assert abs(chi_square - 361) < 5 * (2 * 361) ** 0.5  # 19 * 19 degrees of freedom


def test_a_size_that_no_memory_would_hold():
    size = 5 * 10**12
    place_N = np.arange(size - 10_000, size)
    item_N = KeyedPermutation(size, 3, 1)(place_N)
    assert len(np.unique(item_N)) == 10_000
    assert 0 <= item_N.min() < size / 100
    assert size * 0.99 < item_N.max() < size
    assert abs(item_N.mean() / size - 0.5) < 5 * 12**-0.5 / 100  # standard error
