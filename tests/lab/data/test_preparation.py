"""`prepare` keeps every document, divides without leaks, and never touches what is not its own."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from small_data import document_texts, files_of, make_texts, small_options, write_jsonl

from remoe.errors import DataError
from remoe.lab.data import Dataset, open_dataset, prepare
from remoe.lab.files import locked


def test_every_document_arrives_once_in_order_with_its_domain(opened: Dataset) -> None:
    source = Path(opened.manifest.sources[0])
    given = [(row["domain"], row["text"]) for row in map(json.loads, source.read_text("utf-8").splitlines())]
    train, validation = document_texts(opened, opened.train), document_texts(opened, opened.validation)
    assert sorted(train + validation) == sorted(given)
    for found in (train, validation):
        assert found == [pair for pair in given if pair in set(found)]
    assert 2 <= len(validation) <= 30


def test_files_and_their_groups_are_on_one_side(tmp_path: Path) -> None:
    texts = make_texts(60, words=8)
    rows = [{"text": text, "book": i // 5, "domain": "ab"[i % 2]} for i, text in enumerate(texts)]
    rows += [{"text": "a copy of one text", "book": 100 + i, "domain": "a"} for i in range(3)]
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = small_options(tmp_path / "out", source, group_column="book", validation_fraction=0.3)
    dataset = open_dataset(prepare(options))
    held = {text for _, text in document_texts(dataset, dataset.validation)}
    sides: dict[int, set[bool]] = {}
    for row in rows[:60]:
        sides.setdefault(row["book"], set()).add(row["text"] in held)
    assert all(len(side) == 1 for side in sides.values())
    assert {True} in sides.values()
    assert {False} in sides.values()


def test_named_validation_sources_are_the_validation_split(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "one.jsonl", make_texts(20, seed=1))
    second = write_jsonl(tmp_path / "two.jsonl", make_texts(20, seed=2))
    held = write_jsonl(tmp_path / "held.jsonl", make_texts(5, seed=3))
    dataset = open_dataset(prepare(small_options(tmp_path / "out", first, second, validation=(str(held),))))
    assert dataset.domains == ("held", "one", "two")
    assert dataset.train.num_documents == 40
    assert document_texts(dataset, dataset.validation) == [("held", text) for text in make_texts(5, seed=3)]
    assert dataset.manifest.validation_fraction is None


def test_files_that_are_not_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "texts.jsonl", make_texts(20, seed=1))
    for name in ("notes.rst", "more.rst", "LICENSE", "README.md"):
        (tmp_path / name).write_text("words")
    options = small_options(tmp_path.parent / f"{tmp_path.name}-out", tmp_path)
    prepare(dataclasses.replace(options, quiet=False))
    assert "skipped 4 files of other kinds: .md, .rst, LICENSE" in capsys.readouterr().err


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path, prepared: Path, opened: Dataset) -> None:
    again = prepare(small_options(tmp_path / "again", opened.manifest.sources[0]))
    first, second = files_of(prepared), files_of(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path, opened: Dataset) -> None:
    moved = shutil.copy(opened.manifest.sources[0], tmp_path / "moved.jsonl")
    assert open_dataset(prepare(small_options(tmp_path / "a", moved))).fingerprint == opened.fingerprint
    other = small_options(tmp_path / "b", moved, shard_tokens=3000)
    assert open_dataset(prepare(other)).fingerprint != opened.fingerprint


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, size: int, dtype: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(tmp_path / "given")
    texts = [f"w{size - 1} w{i} w2" for i in range(5, 25)]
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    dataset = open_dataset(prepare(small_options(tmp_path / "out", source, tokenizer=str(tmp_path / "given"))))
    assert dataset.vocab_size == size
    assert dataset.manifest.token_dtype == dataset.train.shards[0].tokens.dtype.name == dtype
    found = document_texts(dataset, dataset.train) + document_texts(dataset, dataset.validation)
    assert sorted(text for _, text in found) == sorted(texts)


def test_missing_tokenizer_shows_before_anything_is_written(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing holds no tokenizer"):
        prepare(small_options(tmp_path / "out", source, tokenizer=str(tmp_path / "nothing")))
    assert files_of(tmp_path / "out") == {}


def test_document_longer_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    long = " ".join(make_texts(1, words=3000))
    texts = [*make_texts(4, seed=1), long, *make_texts(4, seed=2)]
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    held = write_jsonl(tmp_path / "held.jsonl", ["held out"])
    dataset = open_dataset(prepare(small_options(tmp_path / "out", source, validation=(str(held),))))
    assert [shard.num_documents for shard in dataset.train.shards] == [4, 1, 4]
    assert dataset.train.shards[1].num_tokens > 2000
    assert [text for _, text in document_texts(dataset, dataset.train)] == texts


def test_end_of_text_in_a_document_stays_text(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["tells of <|endoftext|> here", "another"])
    dataset = open_dataset(prepare(small_options(tmp_path / "out", source)))
    found = document_texts(dataset, dataset.train) + document_texts(dataset, dataset.validation)
    assert sorted(text for _, text in found) == ["another", "tells of <|endoftext|> here"]


def test_stdlib_is_prepared_without_leaks_between_its_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remoe.lab.data.stdlib import StdlibSource

    library = tmp_path / "lib"
    library.mkdir()
    origin = Path(os.__file__).parent
    for name in (
        "argparse",
        "ast",
        "bisect",
        "calendar",
        "cmd",
        "csv",
        "dis",
        "glob",
        "heapq",
        "queue",
        "types",
    ):
        shutil.copy(origin / f"{name}.py", library)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    dataset = open_dataset(prepare(small_options(tmp_path / "out", "stdlib", shard_tokens=50_000)))
    assert dataset.domains == ("code", "docstrings", "manual")
    groups: dict[str, set[str | None]] = {}
    origin_of = {(item.domain, item.text): item.group for item in StdlibSource(root=library).documents()}
    for split in (dataset.train, dataset.validation):
        found = document_texts(dataset, split)
        assert {domain for domain, _ in found} == {"code", "docstrings", "manual"}
        groups[split.name] = {origin_of[pair] for pair in found} - {None}
    assert groups["train"].isdisjoint(groups["validation"])


def test_finished_preparation_returns_at_once(copied: Path, opened: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    prepare(small_options(copied, opened.manifest.sources[0], quiet=False))
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_failed_overwrite_leaves_the_old_dataset(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    before = files_of(copied)
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2"):
        prepare(small_options(copied, tmp_path / "bad.jsonl", overwrite=True))
    assert files_of(copied) == before


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", OSError("busy")), pytest.raises(DataError, match="another process is preparing"):
        prepare(small_options(tmp_path / "out", source))


@pytest.mark.parametrize("name", ["input.txt", "input.md", "folder/input.txt", "input.jsonl"])
def test_the_end_of_one_input_is_held_out(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"{line}\n" for line in make_texts(200, words=8))
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    if source.suffix == ".jsonl":
        write_jsonl(source, [text])
    else:
        source.write_text(text)
    given = tmp_path / "folder" if "/" in name else source
    dataset = open_dataset(prepare(small_options(tmp_path / "out", given, quiet=False)))
    parts = [document_texts(dataset, split) for split in (dataset.train, dataset.validation)]
    ((domain, train),), ((_, held),) = parts
    assert train + held == text
    assert domain == given.stem
    assert 0.1 * len(text) <= len(held) <= 0.2 * len(text)
    assert "all text is one document" in capsys.readouterr().err
    assert prepare(small_options(tmp_path / "out", given)) == tmp_path / "out"
