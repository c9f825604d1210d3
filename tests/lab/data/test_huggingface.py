"""Datasets written by `datasets` are sources; what cannot be loaded is explained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from remoe.errors import DataError
from remoe.lab.data.documents import Columns
from remoe.lab.data.sources import resolve_source

datasets = pytest.importorskip("datasets")


def read(name: str, **columns: str) -> list[tuple[str, str]]:
    return [(item.text, item.domain) for item in resolve_source(name, Columns(**columns)).documents()]


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folder_of_save_to_disk(tmp_path: Path, prefix: str) -> None:
    texts = [f"text {i}" for i in range(600)]
    datasets.Dataset.from_dict({"text": texts, "n": range(600)}).save_to_disk(tmp_path / "saved")
    assert read(f"{prefix}{tmp_path / 'saved'}") == [(text, "saved") for text in texts]


def test_split_of_a_saved_dictionary(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name, ""], "domain": ["d", "d"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved")) == [("train", "d")]
    assert read(f"hf:{tmp_path / 'saved'}::test") == [("test", "d")]
    with pytest.raises(DataError, match=r"no split 'dev'.*\(has train, test\)"):
        read(f"hf:{tmp_path / 'saved'}::dev")


def test_null_text_and_missing_column_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "nulls")
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(tmp_path / "bodies")
    with pytest.raises(DataError, match="nulls: row 1: the text is missing"):
        read(str(tmp_path / "nulls"))
    with pytest.raises(DataError, match=r"bodies: no column 'text' \(columns present: body\)"):
        read(str(tmp_path / "bodies"))


def test_one_column_may_be_domain_and_group(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "book": ["x", "y"]}).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved"), domain="book", group="book") == [("a", "x"), ("b", "y")]


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was not written by save_to_disk"):
        read(f"hf:{tmp_path}")


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of an absent package meets
    with pytest.raises(DataError, match=r"pip install -e '\.\[datasets\]'"):
        read("hf:someone/something")


def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
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
