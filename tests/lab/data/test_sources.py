"""Files, folders and datasets are found by name and give their domains; anything else is explained in one line."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import write_rows

from remoe.errors import DataError
from remoe.lab.cli.main import main
from remoe.lab.data.documents import Columns
from remoe.lab.data.sources import resolve_source


@pytest.fixture
def datasets() -> ModuleType:
    return pytest.importorskip("datasets")


def read(name: Path | str, **columns: str) -> list[tuple[str, str]]:
    return [(item.text, item.domain) for item in resolve_source(str(name), Columns(**columns)).documents()]


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folder_of_save_to_disk(tmp_path: Path, datasets: ModuleType, prefix: str) -> None:
    texts = [f"text {i}" for i in range(600)]
    datasets.Dataset.from_dict({"text": texts, "n": range(600)}).save_to_disk(tmp_path / "saved")
    assert read(f"{prefix}{tmp_path / 'saved'}") == [(text, "saved") for text in texts]


def test_split_of_a_saved_dictionary(tmp_path: Path, datasets: ModuleType) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name, ""], "domain": ["d", "d"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved")) == [("train", "d")]
    assert read(f"hf:{tmp_path / 'saved'}::test") == [("test", "d")]
    with pytest.raises(DataError, match=r"no split 'dev'.*\(has train, test\)"):
        read(f"hf:{tmp_path / 'saved'}::dev")


def test_null_text_and_missing_column_are_named(tmp_path: Path, datasets: ModuleType) -> None:
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "nulls")
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(tmp_path / "bodies")
    with pytest.raises(DataError, match="nulls: row 1: the text is missing"):
        read(str(tmp_path / "nulls"))
    with pytest.raises(DataError, match=r"bodies: no column 'text' \(columns present: body\)"):
        read(str(tmp_path / "bodies"))


def test_one_column_may_be_domain_and_group(tmp_path: Path, datasets: ModuleType) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "book": ["x", "y"]}).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved"), domain="book", group="book") == [("a", "x"), ("b", "y")]


def test_folder_of_something_else_is_refused(tmp_path: Path, datasets: ModuleType) -> None:
    with pytest.raises(DataError, match="was not written by save_to_disk"):
        read(f"hf:{tmp_path}")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of an absent package meets
    with pytest.raises(DataError, match=r"pip install .*\[datasets\]"):
        read("hf:someone/something")


def test_unreachable_hub_is_one_line(tmp_path: Path, datasets: ModuleType) -> None:
    code = (
        "from remoe.lab.data.documents import Columns\n"
        "from remoe.lab.data.sources import resolve_source\n"
        "from remoe.errors import DataError\n"
        "try: resolve_source('hf:no-such-owner/no-such-data', Columns())\n"
        "except DataError as error: print(error)\n"
    )
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("hf:no-such-owner/no-such-data: cannot be loaded from the Hugging Face hub: ")


def test_domain_is_the_first_component_below_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for folder in ("", "v1.2/deep", "a", ".hidden"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "z.txt").write_text(f"in {folder}")
    for name in ("books.jsonl.zst", "web.parquet"):
        write_rows(root / name, [("first", "x")])
    write_rows(root / "a" / "nested.jsonl", [("nested", "own")])
    (root / "README.md").write_text("not data")
    assert read(root, domain="domain") == [
        ("nested", "own"),
        ("in a", "a"),
        ("first", "x"),
        ("in v1.2/deep", "v1.2"),
        ("first", "x"),
        ("in ", "corpus"),
    ]
    for name in ("books.jsonl.zst", "web.parquet"):
        (root / name).unlink()
    (root / "books.jsonl").write_text('{"text": "no domain"}\n')
    pq.write_table(pa.table({"text": ["no domain"]}), root / "web.v2.parquet")
    assert [domain for text, domain in read(root) if text == "no domain"] == ["books", "web.v2"]


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    for name in ("corpus/real", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(f"in {name}")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "real" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "a link to the first").symlink_to(tmp_path / "corpus" / "real")
    (tmp_path / "corpus" / "same").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "corpus") == [("in elsewhere", "linked"), ("in corpus/real", "real")]


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "b.pdf").write_text("x")
    with pytest.raises(DataError, match=r"a\.pdf: unknown file type"):
        read(tmp_path / "a.pdf")
    with pytest.raises(DataError, match=r"empty: .* no files to read"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match=r"gone\.txt: no such file or folder"):
        read(tmp_path / "gone.txt")


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("x")
    scandir = os.scandir

    def guarded(path: str) -> Iterator[os.DirEntry]:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    with pytest.raises(DataError, match="closed: Permission denied"):
        read(tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path, inside: bool) -> None:
    os.mkfifo(tmp_path / "f.txt")
    (tmp_path / "g.txt").write_text("text")
    with pytest.raises(DataError, match=r"f\.txt: not a file but a pipe"):
        resolve_source(str(tmp_path if inside else tmp_path / "f.txt"), Columns())


@pytest.mark.parametrize("place", ["file", "folder", "out", "tokenizer", "validation"])
def test_names_that_are_not_utf8_are_one_line(tmp_path: Path, place: str, capsys) -> None:
    strange, usual = tmp_path / "b\udcff.txt", tmp_path / "a.txt"
    (tmp_path / "texts").mkdir()
    for path in (strange, usual, tmp_path / "texts" / strange.name):
        path.write_text("text")
    arguments = {
        "file": [strange],
        "folder": [tmp_path / "texts"],
        "out": [usual],
        "tokenizer": [usual, "--tokenizer", strange],
        "validation": [usual, "--validation", strange],
    }[place]
    out = tmp_path / ("o\udcff" if place == "out" else "out")
    assert main(["data", "prepare", *map(str, arguments), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "this name is not UTF-8; rename it" in error
