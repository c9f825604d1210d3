"""Training batches of a stream: windows of text that is read and tokenised as they are needed.

The files of the stream are divided into parts, and so are the rows of a batch: each part has its own rows. A part's
documents, joined in order, are cut into windows, which are shuffled within blocks and dealt to the part's rows. All of
this depends on the files, the batch size and the seed alone. A rank reads only the parts that have its rows.

Shape suffixes: B batch, S sequence, T tokens.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from remoe.errors import CheckpointError, ConfigError, DataError
from remoe.lab.data.dataset import Dataset
from remoe.lab.data.documents import Document
from remoe.lab.data.stream import HOLDOUT, State, TextStream, reopen
from remoe.lab.data.tokenizer import Encoder

BLOCK = 256  # windows that are shuffled together
MOST_PARTS = 256  # each holds an open file, a block and some text in memory
CHARACTERS = 2**18  # of documents that are tokenised together


@dataclass(frozen=True)
class Place:
    """Where a block of a part begins.

    Attributes:
        block: its number.
        epoch: how often the part has been read before.
        source: the state from which the first document is read.
        offset: tokens of that document before the block.
    """

    block: int = 0
    epoch: int = 0
    source: State = None
    offset: int = 0


class _Encoded(NamedTuple):
    """A document's tokens with EOS, uint32 (T), and from where it is read."""

    epoch: int
    source: State
    tokens_T: np.ndarray


class StreamBatches:
    """Batches of a dataset that is a stream. Steps must be asked for in order; `state` resumes at any of them.

    Args:
        dataset: with a `stream`.
        seq_len: predictions of a window.
        batch_size: sequences of a step, B.
        seed: of the order within blocks.

    Raises:
        DataError: when the source is gone or has changed.
    """

    def __init__(self, dataset: Dataset, seq_len: int, batch_size: int, seed: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise ConfigError(f"sequence length and batch size must be positive, not {seq_len} and {batch_size}")
        record = dataset.manifest.stream
        assert record is not None
        stream, self.batch_size = reopen(record), batch_size
        common = math.gcd(record.files, batch_size)
        parts = max(divisor for divisor in range(1, min(common, MOST_PARTS) + 1) if common % divisor == 0)
        encode = Encoder(dataset.load_tokenizer())
        self._parts = [
            _Part(stream, (part, parts), encode, dataset.eos_token_id, seq_len, seed) for part in range(parts)
        ]

    @property
    def parts(self) -> int:
        """Into how many parts the files and the rows of a batch are divided."""
        return len(self._parts)

    def batch(self, step: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The batch of a step, or some rows of it, as `TrainBatches.batch`: int64 (B, S + 1).

        Raises DataError for text that cannot be read.
        """
        rows = range(self.batch_size) if rows is None else rows
        size = self.batch_size // self.parts  # rows of a part
        windows = [self._parts[row // size].window(step * size + row % size) for row in rows]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def target_mask(self, step: int, rows: Sequence[int] | None = None) -> None:
        """None: all targets count."""

    def state(self) -> list[dict[str, Any]]:
        """Where the present block of each part begins; of a part that is not read here, where an earlier one does."""
        return [asdict(part.place) for part in self._parts]

    def load_state(self, state: list[dict[str, Any]] | None) -> None:
        """Continues from a state, or from the newest of each part's states in several ranks; see `newest_state`.

        Raises:
            CheckpointError: for a state of other batches.
        """
        try:
            places = [Place(**place) for place in state]
            for part, place in zip(self._parts, places, strict=True):
                part.begin(place)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint has no state of this stream, or a damaged one ({error})") from error


def newest_state(states: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The state of all parts from those of several ranks, of which each has read some parts."""
    return [max(places, key=lambda place: place["block"]) for places in zip(*states, strict=True)]


class _Part:
    """The windows of one part, block after block."""

    def __init__(
        self, stream: TextStream, part: tuple[int, int], encode: Encoder, eos: int, seq_len: int, seed: int
    ) -> None:
        self._stream, self._part, self._encode, self._eos = stream, part, encode, eos
        self._seq_len, self._seed = seq_len, seed
        self.begin(Place())

    def begin(self, place: Place) -> None:
        """Goes on from a place, before which nothing is read."""
        self.place, self._begun = place, False
        self._offset = place.offset
        self._pending: deque[_Encoded] = deque()
        self._documents = self._read(place)
        self._windows_WS = np.empty((0, 0), np.uint32)

    def window(self, number: int) -> np.ndarray:
        """uint32 (S + 1): a window, by its number among those of the part; never one of an earlier block."""
        block, within = divmod(number, BLOCK)
        if not self._begun:
            self._begun = True
            self._read_block()
        while self.place.block < block:
            first = self._pending[0]
            self.place = Place(self.place.block + 1, first.epoch, first.source, self._offset)
            self._read_block()
        assert self.place.block == block
        return self._windows_WS[within]

    def _read_block(self) -> None:
        """Reads the windows of the block that begins at `_offset` in the first pending document, and goes to its end.

        Neighbouring windows share a token, the target of one and the first input of the other, and so do blocks.
        """
        length = BLOCK * self._seq_len
        held = sum(len(item.tokens_T) for item in self._pending)
        while held < self._offset + length + 1:
            self._pending.append(next(self._documents))
            held += len(self._pending[-1].tokens_T)
        token_T, filled, start = np.empty(length + 1, np.uint32), 0, self._offset
        for item in self._pending:
            piece_T = item.tokens_T[start : start + length + 1 - filled]
            token_T[filled : filled + len(piece_T)] = piece_T
            filled, start = filled + len(piece_T), 0
        windows_WS = np.lib.stride_tricks.sliding_window_view(token_T, self._seq_len + 1)[:: self._seq_len]
        order_W = np.random.Generator(np.random.PCG64([self._seed, self._part[0], self.place.block])).permutation(BLOCK)
        self._windows_WS = windows_WS[order_W]
        self._offset += length
        while self._offset >= len(self._pending[0].tokens_T):
            self._offset -= len(self._pending.popleft().tokens_T)

    def _read(self, place: Place) -> Iterator[_Encoded]:
        """The documents from a place on, again from the beginning after the last."""
        epoch, source, any_text = place.epoch, place.source, False
        while True:
            for batch in _batches(self._stream.documents(*self._part, source)):
                any_text = True
                for (state, _), ids in zip(batch, self._encode([item.text for _, item in batch]), strict=True):
                    token_T = np.empty(len(ids) + 1, np.uint32)
                    token_T[:-1], token_T[-1] = ids, self._eos
                    yield _Encoded(epoch, state, token_T)
            if not any_text and source is None:
                raise DataError(f"{self._stream.record.source}: no text to train on in one of its parts")
            epoch, source = epoch + 1, None


def _batches(documents: Iterator[tuple[State, Document | None]]) -> Iterator[list[tuple[State, Document]]]:
    """Lists of documents that are not held out, each of about CHARACTERS characters."""
    batch: list[tuple[State, Document]] = []
    size = 0
    for state, document in documents:
        if document is None or HOLDOUT.holds_out(document):
            continue
        batch.append((state, document))
        size += len(document.text)
        if size >= CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
