"""The threads that read and encode keep order, pass errors on, and end when their reader stops."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from remoe.lab.data.documents import Document
from remoe.lab.data.writer import encode_documents, prefetch


def test_prefetch_keeps_order_and_passes_errors_on() -> None:
    def items() -> Iterator[int]:
        yield from range(50)
        raise ValueError("after fifty")

    stream = prefetch(items())
    assert [next(stream) for _ in range(50)] == list(range(50))
    with pytest.raises(ValueError, match="after fifty"):
        next(stream)


def test_prefetch_stops_its_thread_when_closed() -> None:
    before = threading.active_count()
    stream = prefetch(iter(range(1_000_000)))
    assert next(stream) == 0
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_documents_of_all_sizes_keep_their_tokens() -> None:
    sizes = [1, 2_500_000, 3, 700_000, 700_000, 5]
    documents = [Document(chr(ord("a") + i) * size, "d") for i, size in enumerate(sizes)]

    def encode(texts: list[str]) -> list[list[int]]:
        return [[ord(text[0]), len(text) % 1000] for text in texts]

    found = list(encode_documents(documents, encode, 7, np.dtype("uint16")))
    assert [document for document, _ in found] == documents
    for i, (_, tokens_S) in enumerate(found):
        assert tokens_S.dtype == np.uint16
        assert tokens_S.tolist() == [ord("a") + i, sizes[i] % 1000, 7]
