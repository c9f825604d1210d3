"""`prepare` keeps every document, divides without leaks, and never touches what is not its own."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe.errors import ConfigError, DataError
from remoe.lab.data import Dataset, PrepareOptions, open_dataset, prepare
from remoe.lab.data.documents import Document
from remoe.lab.files import locked

Options = Callable[..., PrepareOptions]
Texts = Callable[..., list[str]]
Writer = Callable[..., Path]
Decoder = Callable[..., list[tuple[str, str]]]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_arrives_once_in_order_with_its_domain(opened: Dataset, document_texts: Decoder) -> None:
    source = Path(opened.manifest.sources[0])
    given = [(row["domain"], row["text"]) for row in map(json.loads, source.read_text("utf-8").splitlines())]
    train, validation = document_texts(opened, opened.train), document_texts(opened, opened.validation)
    assert sorted(train + validation) == sorted(given)
    for found in (train, validation):
        assert found == [pair for pair in given if pair in set(found)]
    assert 2 <= len(validation) <= 30


def test_files_and_their_groups_are_on_one_side(
    tmp_path: Path, small_options: Options, make_texts: Texts, document_texts: Decoder
) -> None:
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


def test_named_validation_sources_are_the_validation_split(
    tmp_path: Path, small_options: Options, make_texts: Texts, write_jsonl: Writer, document_texts: Decoder
) -> None:
    first = write_jsonl(tmp_path / "one.jsonl", make_texts(20, seed=1))
    second = write_jsonl(tmp_path / "two.jsonl", make_texts(20, seed=2))
    held = write_jsonl(tmp_path / "held.jsonl", make_texts(5, seed=3))
    dataset = open_dataset(prepare(small_options(tmp_path / "out", first, second, validation=(str(held),))))
    assert dataset.domains == ("held", "one", "two")
    assert dataset.train.num_documents == 40
    assert document_texts(dataset, dataset.validation) == [("held", text) for text in make_texts(5, seed=3)]
    assert dataset.manifest.validation_fraction is None


def test_files_that_are_not_read_are_named(
    tmp_path: Path,
    small_options: Options,
    write_jsonl: Writer,
    make_texts: Texts,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "texts.jsonl", make_texts(20, seed=1))
    for name in ("notes.md", "more.md", "LICENSE"):
        (tmp_path / name).write_text("words")
    options = small_options(tmp_path.parent / f"{tmp_path.name}-out", tmp_path)
    prepare(dataclasses.replace(options, quiet=False))
    assert "left out 3 files of other kinds: .md, LICENSE" in capsys.readouterr().err


def test_preparing_twice_gives_the_same_bytes(
    tmp_path: Path, prepared: Path, small_options: Options, opened: Dataset
) -> None:
    again = prepare(small_options(tmp_path / "again", opened.manifest.sources[0]))
    first, second = files_of(prepared), files_of(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path, opened: Dataset, small_options: Options) -> None:
    moved = shutil.copy(opened.manifest.sources[0], tmp_path / "moved.jsonl")
    assert open_dataset(prepare(small_options(tmp_path / "a", moved))).fingerprint == opened.fingerprint
    other = small_options(tmp_path / "b", moved, shard_tokens=3000)
    assert open_dataset(prepare(other)).fingerprint != opened.fingerprint


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_are_as_wide_as_the_vocabulary_needs(
    tmp_path: Path,
    small_options: Options,
    write_jsonl: Writer,
    size: int,
    dtype: str,
    document_texts: Decoder,
) -> None:
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


def test_missing_tokenizer_shows_before_anything_is_written(
    tmp_path: Path, small_options: Options, write_jsonl: Writer
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: cannot be loaded"):
        prepare(small_options(tmp_path / "out", source, tokenizer=str(tmp_path / "nothing")))
    assert files_of(tmp_path / "out") == {}


def test_document_longer_than_a_shard_has_one_to_itself(
    tmp_path: Path, small_options: Options, make_texts: Texts, write_jsonl: Writer, document_texts: Decoder
) -> None:
    long = " ".join(make_texts(1, words=3000))
    texts = [*make_texts(4, seed=1), long, *make_texts(4, seed=2)]
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    held = write_jsonl(tmp_path / "held.jsonl", ["held out"])
    dataset = open_dataset(prepare(small_options(tmp_path / "out", source, validation=(str(held),))))
    assert [shard.num_documents for shard in dataset.train.shards] == [4, 1, 4]
    assert dataset.train.shards[1].num_tokens > 2000
    assert [text for _, text in document_texts(dataset, dataset.train)] == texts


def test_end_of_text_in_a_document_stays_text(
    tmp_path: Path, small_options: Options, write_jsonl: Writer, document_texts: Decoder
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["tells of <|endoftext|> here", "another"])
    dataset = open_dataset(prepare(small_options(tmp_path / "out", source)))
    found = document_texts(dataset, dataset.train) + document_texts(dataset, dataset.validation)
    assert sorted(text for _, text in found) == ["another", "tells of <|endoftext|> here"]


def test_stdlib_is_prepared_without_leaks_between_its_domains(
    tmp_path: Path, small_options: Options, monkeypatch: pytest.MonkeyPatch, document_texts: Decoder
) -> None:
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


def test_finished_preparation_returns_at_once(copied: Path, opened: Dataset, small_options: Options) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    prepare(small_options(copied, opened.manifest.sources[0], quiet=False))
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_are_refused_until_overwritten(
    copied: Path, tmp_path: Path, opened: Dataset, small_options: Options, finished: bool, write_jsonl: Writer
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
        with pytest.raises(DataError, match=rf"with other arguments \({flag}.*--overwrite"):
            prepare(small_options(copied, source, **changes))
    assert files_of(copied) == before
    (copied / "notes.md").write_text("mine")
    prepare(small_options(copied, source, vocab_size=310, overwrite=True))
    assert open_dataset(copied).vocab_size == 310
    assert (copied / "notes.md").read_text() == "mine"


def test_changed_source_is_refused_until_overwritten(
    tmp_path: Path, small_options: Options, make_texts: Texts, write_jsonl: Writer
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_texts(20))
    prepare(small_options(tmp_path / "out", source))
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"d\.jsonl has changed since .*is another version.*--overwrite"):
        prepare(small_options(tmp_path / "out", source))
    prepare(small_options(tmp_path / "out", source, overwrite=True))
    prepare(small_options(tmp_path / "out", source))


def test_damaged_shard_stops_a_resumed_preparation(copied: Path, opened: Dataset, small_options: Options) -> None:
    journal = json.loads((copied / "preparation.json").read_text())
    (copied / "preparation.json").write_text(json.dumps(journal | {"finished": False}))
    (copied / "train-00001.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-00001\.safetensors: .*; use --overwrite to start again"):
        prepare(small_options(copied, opened.manifest.sources[0]))


def test_failed_overwrite_leaves_the_old_dataset(copied: Path, tmp_path: Path, small_options: Options) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    before = files_of(copied)
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2"):
        prepare(small_options(copied, tmp_path / "bad.jsonl", overwrite=True))
    assert files_of(copied) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_others_is_left_alone(
    tmp_path: Path, small_options: Options, write_jsonl: Writer, overwrite: bool
) -> None:
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


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, small_options: Options, write_jsonl: Writer) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", OSError("busy")), pytest.raises(DataError, match="another preparation is writing"):
        prepare(small_options(tmp_path / "out", source))


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'], ids=["nothing", "blank"])
def test_empty_corpus_is_refused(tmp_path: Path, small_options: Options, content: str, write_jsonl: Writer) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"d\.jsonl: no text found"):
        prepare(small_options(tmp_path / "out", tmp_path / "d.jsonl"))
    full = write_jsonl(tmp_path / "full.jsonl", ["some text"])
    with pytest.raises(DataError, match=r"d\.jsonl: no text found"):
        prepare(small_options(tmp_path / "out", full, validation=(str(tmp_path / "d.jsonl"),)))


def test_the_same_text_in_both_splits_or_twice_is_refused(tmp_path: Path, small_options: Options) -> None:
    import datasets

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(saved)
    for source in (str(saved), "stdlib"):
        with pytest.raises(DataError, match="is both a training and a validation source"):
            prepare(small_options(tmp_path / "out", source, validation=(source,)))
        with pytest.raises(DataError, match="is named twice"):
            prepare(small_options(tmp_path / "out", source, source))


def test_file_in_both_splits_is_refused(tmp_path: Path, small_options: Options, write_jsonl: Writer) -> None:
    (tmp_path / "corpus" / "held").mkdir(parents=True)
    write_jsonl(tmp_path / "corpus" / "d.jsonl", ["one", "two"])
    write_jsonl(tmp_path / "corpus" / "held" / "e.jsonl", ["three"])
    held = (str(tmp_path / "corpus" / "held"),)
    with pytest.raises(DataError, match=r"e\.jsonl: is both a training and a validation source"):
        prepare(small_options(tmp_path / "out", tmp_path / "corpus", validation=held))


def test_out_inside_a_source_is_refused(tmp_path: Path, small_options: Options, write_jsonl: Writer) -> None:
    write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    with pytest.raises(ConfigError, match="lies in the source"):
        prepare(small_options(tmp_path / "out", tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": ()},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"vocab_size": 256},
        {"tokenizer_sample_mb": 0.0},
        {"shard_tokens": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_work(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ConfigError):
        PrepareOptions(out=tmp_path, **changes)


def test_document_sizes_are_utf8_bytes() -> None:
    assert Document("aé🙂", "d").num_bytes == 1 + 2 + 4
