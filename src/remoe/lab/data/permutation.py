"""A shuffled order of any number of items that is computed item by item and never held in memory."""

import math

import numpy as np

from remoe.errors import ConfigError

ROUNDS = 8  # four make a Feistel network of random functions pseudorandom; the rest is for small halves


class KeyedPermutation:
    """A permutation of 0 .. `size` - 1 that is a pure function of its key; `permutation[index_N]` is int64 (N).

    A balanced Feistel network permutes the pairs of two numbers below r, the size's square root rounded up. Values
    beyond the size, a share of less than 2 / r, are sent through it again until they are below (cycle walking). So it
    is a bijection by construction, and takes no memory. Sources: Luby and Rackoff, "How to construct
    pseudorandom permutations from pseudorandom functions" (1988); Black and Rogaway, "Ciphers with arbitrary finite
    domains" (2002), whose generalised network adds modulo r.

    Args:
        size: number of items, 1 to 2^62.
        key: integers of at least 0 that choose the permutation; NumPy's `SeedSequence` makes the rounds' keys of them.

    Raises:
        ConfigError: for another size.
    """

    def __init__(self, size: int, *key: int) -> None:
        if not 1 <= size <= 2**62:
            raise ConfigError(f"a permutation of {size} items; it must be of 1 to 2^62")
        self.size = size
        self._root = np.uint64(max(2, math.isqrt(size - 1) + 1))
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __getitem__(self, index_N: np.ndarray) -> np.ndarray:
        value_N = self._network(np.asarray(index_N).astype(np.uint64))
        beyond = np.flatnonzero(value_N >= self.size)
        while len(beyond):
            value_N[beyond] = self._network(value_N[beyond])
            beyond = beyond[value_N[beyond] >= self.size]
        return value_N.astype(np.int64)

    def _network(self, value_N: np.ndarray) -> np.ndarray:
        left_N, right_N = np.divmod(value_N, self._root)
        for key in self._keys:
            left_N, right_N = right_N, (left_N + _mix(right_N ^ key) % self._root) % self._root
        return left_N * self._root + right_N


def _mix(value_N: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit depends on every bit of uint64 (N)."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))
