"""A dataset opens only if every file is the one that was written; `verify_hashes` sees a single bit."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from small_data import make_texts, small_options, write_jsonl

from remoe.errors import DataError
from remoe.lab.data import Dataset, open_dataset, prepare, verify_hashes

SHARD = "train-00001.safetensors"


def test_sizes_agree_with_the_shards(opened: Dataset) -> None:
    assert opened.vocab_size == 300
    assert opened.domains == ("a", "b", "c")
    for split in (opened.train, opened.validation):
        assert split.num_tokens == sum(len(shard.tokens) for shard in split.shards)
        assert split.num_documents == sum(len(shard.document_bytes) for shard in split.shards)
        assert split.num_bytes == sum(int(shard.document_bytes.sum()) for shard in split.shards)
        domains = split.record.domains
        assert sum(counts.tokens for counts in domains.values()) == split.num_tokens
        assert set(domains) == {"a", "b", "c"}
    assert len(opened.train.shards) > 2
    assert all(shard.num_tokens <= 2000 for shard in opened.train.shards)


def test_tokens_are_memory_maps_and_are_not_pickled(opened: Dataset) -> None:
    assert isinstance(opened.train.shards[0].tokens, np.memmap)
    again = pickle.loads(pickle.dumps(opened))
    assert len(pickle.dumps(opened.train)) < 20_000
    np.testing.assert_array_equal(again.train.shards[1].tokens, opened.train.shards[1].tokens)


def test_safetensors_reads_the_shards(opened: Dataset) -> None:
    from safetensors.numpy import load_file

    shard = opened.train.shards[0]
    arrays = load_file(shard.path)
    assert set(arrays) == {"tokens", "document_offsets", "document_domain", "document_bytes"}
    assert arrays["tokens"].dtype == np.uint16
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(shard, name))


@pytest.mark.parametrize("lost", [1, 1000, 10_000_000], ids=["one byte", "1000 bytes", "all"])
def test_truncated_shard_is_named(copied: Path, lost: int) -> None:
    content = (copied / SHARD).read_bytes()
    (copied / SHARD).write_bytes(content[: max(len(content) - lost, 0)])
    with pytest.raises(DataError, match=SHARD):
        open_dataset(copied)


def test_missing_shard_is_named(copied: Path) -> None:
    (copied / SHARD).unlink()
    with pytest.raises(DataError, match=f"{SHARD}: shard missing"):
        open_dataset(copied)


def test_shard_of_another_tokenizer_is_named(copied: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_texts(90, seed=5))
    other = prepare(small_options(tmp_path / "other", source, vocab_size=320))
    (copied / SHARD).write_bytes((other / SHARD).read_bytes())
    with pytest.raises(DataError, match=f"{SHARD}: foreign shard: made with another tokenizer"):
        open_dataset(copied)


def test_shards_that_changed_places_are_named(copied: Path) -> None:
    (copied / SHARD).write_bytes((copied / "train-00000.safetensors").read_bytes())
    with pytest.raises(DataError, match=f"{SHARD}: foreign shard: it is number 0"):
        open_dataset(copied)
    (copied / SHARD).write_bytes((copied / "validation-00000.safetensors").read_bytes())
    with pytest.raises(DataError, match=f"{SHARD}: foreign shard: it is number 0 of a validation split"):
        open_dataset(copied)


@pytest.mark.parametrize("name", ["tokens", "document_offsets", "document_domain", "document_bytes"])
def test_flipped_bit_is_found(copied: Path, name: str) -> None:
    verify_hashes(open_dataset(copied))
    _, start, _ = open_dataset(copied).train.shards[1].layout[name]
    content = bytearray((copied / SHARD).read_bytes())
    content[start + 1] ^= 1
    (copied / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged .*sha256.*: {SHARD}$"):
        verify_hashes(open_dataset(copied))


def test_altered_manifest_is_found(copied: Path) -> None:
    path = copied / "dataset.json"
    good = json.loads(path.read_text())

    def rewrite(**changes: object) -> None:
        path.write_text(json.dumps(good | changes))

    rewrite(eos_token_id=5)
    with pytest.raises(DataError, match=r"dataset\.json: does not match its own fingerprint"):
        open_dataset(copied)
    rewrite(version=2)
    with pytest.raises(DataError, match="format version 2, but this remoe reads version 1"):
        open_dataset(copied)
    rewrite(format="other")
    with pytest.raises(DataError, match="not a file of the format"):
        open_dataset(copied)
    rewrite(splits={})
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(copied)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        open_dataset(copied)


def test_tokenizer_that_was_replaced_is_found(copied: Path) -> None:
    path = copied / "tokenizer" / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    definition["model"]["merges"].pop()
    path.write_text(json.dumps(definition), encoding="utf-8")
    dataset = open_dataset(copied)
    with pytest.raises(DataError, match="not the tokenizer that made the shards"):
        dataset.load_tokenizer()


def test_folders_that_are_no_dataset(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(DataError, match="no such dataset folder"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match=r"not a dataset: it has no dataset\.json"):
        open_dataset(tmp_path)
    (copied / "dataset.json").unlink()
    with pytest.raises(DataError, match="unfinished; run the same `remoe data prepare`"):
        open_dataset(copied)
