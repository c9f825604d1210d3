"""Slices of the list of pairs that are worked off one after the other, for backends on whose device the list has room
for every possible pair.

How many windows there could be follows from the length of the list. How many have pairs only the device knows.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

# Windows that the stored pairs take at most: the more, the less scratch memory and the more kernels.
STORED_WINDOWS = 4
# What the number of stored pairs is made a multiple of, so that it divides into so many windows.
STORED_MULTIPLE = math.lcm(*range(1, STORED_WINDOWS + 1))
# Rows, so that a machine has enough to do with one window.
MIN_WINDOW = 8192
MIN_STORED_WINDOW = 4096  # shorter ones would be too many over the whole list


def windows(pairs: int, stored: int, tokens: int, d_model: int, d_ffn: int) -> list[range]:
    """Slices of the list of pairs, so short that scratch memory is no more than what is stored, as far as the stored
    pairs may be divided: into STORED_WINDOWS at most, of MIN_WINDOW rows at least, and without remainder.

    A row of scratch memory has the gradient of a pair's pre-activations (2 F numbers) and its hidden activation or its
    row of the output (F or D). All windows but the last are of one length. One of them ends with the stored pairs,
    because a window that reaches beyond them is computed again as a whole; only where they are few, longer windows cost
    less than many.
    """
    if stored < MIN_STORED_WINDOW:
        rows = max(0 if stored else 4 * tokens, 2 * MIN_WINDOW)
    else:
        scratch = -(-(2 * d_ffn + max(d_model, d_ffn)) // (2 * d_ffn))
        count = min(scratch, STORED_WINDOWS, max(1, stored // MIN_WINDOW))
        while stored < pairs and stored % count:
            count -= 1
        rows = -(-stored // count)
    return [range(first, min(first + rows, pairs)) for first in range(0, pairs, rows)]


class PairCount:
    """The number of pairs, which the device tells the host while the host goes on.

    Args:
        count_E: pairs of each expert.
        slices: windows of the list; about a single one there is nothing to tell.
    """

    def __init__(self, count_E: Tensor, slices: int) -> None:
        self._count_E = count_E
        self._told: torch.cuda.Event | None = None
        with torch.cuda.device_of(count_E):  # whose stream the event is recorded on
            if slices > 1 and count_E.is_cuda and not torch.cuda.is_current_stream_capturing():
                self._host = torch.empty((), dtype=torch.int64, pin_memory=True)
                self._host.copy_(self.total, non_blocking=True)
                self._told = torch.cuda.Event()
                self._told.record()

    @cached_property
    def total(self) -> Tensor:
        """0-dim int64, the number on the device."""
        return self._count_E.sum()

    def end_before(self, window: range, wait: bool = False) -> bool:
        """Whether there are no pairs from this window on. False, too, where the host does not know.

        Args:
            window: not the first one, of which this is never said: it also writes what has no pairs.
            wait: wait for the device, unless a CUDA graph is captured.
        """
        if window.start == 0 or self._told is None:
            return False
        if wait:
            self._told.synchronize()
        return self._told.query() and int(self._host) <= window.start
