"""A random order of any number of items that takes no memory: each place is computed by itself.

Shape suffix: N places.
"""

import numpy as np

ROUNDS = 6


class KeyedPermutation:
    """A permutation of 0 to size - 1 that depends on the key alone.

    A balanced Feistel network permutes the numbers below the next power of four. A number that it sends outside of the
    size is sent on until it falls inside (cycle walking), 4 times on average at most.

    Args:
        size: how many items; at least 1.
        key: numbers from 0 on, such as a seed and an epoch.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = np.uint64(-(-(size - 1).bit_length() // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, place_N: np.ndarray) -> np.ndarray:
        """(N,) int64: which items are at these places, (N,) integers from 0 to size - 1."""
        item_N = self._network(place_N.astype(np.uint64))
        while (outside_N := item_N >= self.size).any():
            item_N[outside_N] = self._network(item_N[outside_N])
        return item_N.astype(np.int64)

    def _network(self, number_N: np.ndarray) -> np.ndarray:
        left_N, right_N = number_N >> self._half, number_N & self._mask
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ (_mixed(right_N ^ key) & self._mask)
        return left_N << self._half | right_N


def _mixed(number_N: np.ndarray) -> np.ndarray:
    """(N,) uint64, each bit of which depends on all of the number's: the end of splitmix64 (Steele et al., 2014)."""
    number_N = (number_N ^ (number_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number_N = (number_N ^ (number_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number_N ^ (number_N >> np.uint64(31))
