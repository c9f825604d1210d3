"""Damaged shards are noticed before training, or at the latest where an id is read that no token has."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_data import make_texts, small_options, write_jsonl

from remoe.errors import DataError
from remoe.lab.cli.main import main
from remoe.lab.data import TrainBatches, ValidationWindows, dataset, open_dataset, prepare, spot_check, verify_hashes
from remoe.lab.data.manifest import Shard, array_sha256

TENSORS = ["tokens", "document_offsets", "document_domain", "document_bytes"]


def change(folder: Path, split: str, name: str, edit: Callable[[np.ndarray], None]) -> Path:
    """Edits a tensor of the last shard of a split in place; returns the shard."""
    shard = getattr(open_dataset(folder), split).shards[-1]
    dtype, start, length = shard.layout[name]
    array = np.memmap(shard.path, dtype, mode="r+", offset=start, shape=(length,))
    edit(array)
    array.flush()
    return shard.path


def put(place: int, value: int) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array[place] = value

    return edit


def flip(array: np.ndarray) -> None:
    array[len(array) // 2] ^= 1


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", TENSORS)
def test_training_refuses_a_small_dataset_with_one_flipped_bit(copied, tmp_path, capsys, split, name):
    path = change(copied, split, name, flip)
    assert main(["train", "--data", str(copied), "--out", str(tmp_path / "run"), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert path.name in error
    assert not (tmp_path / "run").exists()


LARGE_DAMAGE = {
    "an id too large": ("tokens", put(0, 300)),
    "the largest id": ("tokens", put(-2, 65535)),
    "zeros": ("tokens", lambda tokens: tokens.fill(0)),
    "no EOS": ("tokens", put(-1, 7)),
    "a document before the first": ("document_offsets", put(0, 1)),
    "documents out of order": ("document_offsets", put(2, 1)),
    "a document that ends too early": ("document_offsets", put(-1, 5)),
    "a document that ends too late": ("document_offsets", put(-1, 2**40)),
    "a domain that does not exist": ("document_domain", put(-1, 3)),
    "a domain below 0": ("document_domain", put(0, -1)),
    "bytes below 0": ("document_bytes", put(0, -1)),
}


@pytest.fixture
def large(copied, monkeypatch) -> Path:
    """A dataset that counts as too large to be verified whole."""
    monkeypatch.setattr(dataset, "WHOLE_BYTES", 1000)
    return copied


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("name", "edit"), LARGE_DAMAGE.values(), ids=LARGE_DAMAGE)
def test_blocks_of_a_large_dataset_are_checked(large, split, name, edit):
    spot_check(open_dataset(large))
    path = change(large, split, name, edit)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: damaged.*`remoe data check`"):
        spot_check(open_dataset(large))


def test_only_blocks_of_a_large_dataset_are_read(large, monkeypatch):
    read = 0
    whole = sum(shard.num_tokens for shard in open_dataset(large).train.shards)
    check_ids = dataset.check_ids

    def counted(shard: Shard, start: int, tokens_T: np.ndarray, vocab_size: int) -> None:
        nonlocal read
        read += len(tokens_T)
        check_ids(shard, start, tokens_T, vocab_size)

    monkeypatch.setattr(dataset, "check_ids", counted)
    monkeypatch.setattr(dataset, "BLOCK_TOKENS", 10)
    spot_check(open_dataset(large))
    assert 0 < read < whole / 5


def test_an_id_outside_of_the_vocabulary_names_the_shard(copied):
    path = change(copied, "train", "tokens", put(9, 300))
    batches = TrainBatches(open_dataset(copied).train, 8, 4, seed=0)
    words = rf"{re.escape(str(path))}: damaged: token 9 has id 300, but the vocabulary has 300 ids"
    with pytest.raises(DataError, match=words):
        [batches.batch(step) for step in range(batches.windows_per_epoch // 4 + 1)]
    path = change(copied, "validation", "tokens", put(9, 65535))
    windows = ValidationWindows(open_dataset(copied).validation, 8)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: damaged: token 9 has id 65535"):
        [list(windows.batches(domain, 2)) for domain in windows.domains]


def test_data_check_finds_an_id_that_was_written_so(tmp_path, monkeypatch):
    folder = prepare(small_options(tmp_path / "data", write_jsonl(tmp_path / "d.jsonl", make_texts(30, seed=3))))
    path = change(folder, "train", "tokens", put(9, 400))
    tokens = np.array(open_dataset(folder).train.shards[-1].tokens)
    record = open_dataset(folder).train.record.shards[-1]
    sha256 = dataset.array_sha256
    known = {array_sha256(tokens): record.sha256}  # as if the shard had been written so
    monkeypatch.setattr(dataset, "array_sha256", lambda array: known.get(sha256(array), sha256(array)))
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: damaged: token 9 has id 400"):
        verify_hashes(open_dataset(folder))
