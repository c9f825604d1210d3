"""A preparation resumes only its own work: the same arguments, unchanged sources, whole shards, its own folder."""

import json
import os
from pathlib import Path

import pytest
from small_data import files_of, make_texts, small_options, write_jsonl

from remoe.errors import DataError
from remoe.lab.data import Dataset, open_dataset, prepare


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_are_refused_until_overwritten(
    copied: Path, tmp_path: Path, opened: Dataset, finished: bool
) -> None:
    source = opened.manifest.sources[0]
    held = write_jsonl(tmp_path / "held.jsonl", ["other"])
    if not finished:
        journal = json.loads((copied / "preparation.json").read_text())
        (copied / "preparation.json").write_text(json.dumps(journal | {"finished": False}))
        (copied / "dataset.json").unlink()
    before = files_of(copied)
    for changes in ({"vocab_size": 310}, {"seed": 1}, {"shard_tokens": 999}, {"validation": (str(held),)}):
        flag = "--" + next(iter(changes)).replace("_", "-")
        with pytest.raises(DataError, match=rf"with different arguments \({flag}.*--overwrite"):
            prepare(small_options(copied, source, **changes))
    assert files_of(copied) == before
    (copied / "notes.md").write_text("mine")
    prepare(small_options(copied, source, vocab_size=310, overwrite=True))
    assert open_dataset(copied).vocab_size == 310
    assert (copied / "notes.md").read_text() == "mine"


def test_changed_source_is_refused_until_overwritten(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_texts(20))
    prepare(small_options(tmp_path / "out", source))
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"d\.jsonl has changed since .*was modified.*--overwrite"):
        prepare(small_options(tmp_path / "out", source))
    prepare(small_options(tmp_path / "out", source, overwrite=True))
    prepare(small_options(tmp_path / "out", source))


def test_damaged_shard_stops_a_resumed_preparation(copied: Path, opened: Dataset) -> None:
    journal = json.loads((copied / "preparation.json").read_text())
    (copied / "preparation.json").write_text(json.dumps(journal | {"finished": False}))
    (copied / "train-00001.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-00001\.safetensors: .*; use --overwrite"):
        prepare(small_options(copied, opened.manifest.sources[0]))


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_others_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    out = tmp_path / "out"
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer" / "mine.json").write_text("{}")
    with pytest.raises(DataError, match="not empty and not made by `remoe data prepare`"):
        prepare(small_options(out, source, overwrite=overwrite))
    (out / "dataset.json").write_text('{"format": "of another program"}')
    with pytest.raises(DataError):
        prepare(small_options(out, source, overwrite=overwrite))
    assert files_of(out).keys() == {"tokenizer/mine.json", "dataset.json"}
    with pytest.raises(DataError, match="is a file, not a folder"):
        prepare(small_options(source, source))
