"""A prepared dataset that several files of tests open."""

import shutil
from pathlib import Path

import pytest
from small_data import make_texts, small_options, write_json_rows

from remoe.lab.data import Dataset, open_dataset, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three domains, mixed in order, in several shards; tests must not change it."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = make_texts(120, seed=1)
    rows = [{"text": text, "domain": "abc"[i * 7 % 11 % 3]} for i, text in enumerate(texts)]
    return prepare(small_options(folder / "data", write_json_rows(folder / "mixed.jsonl", rows)))


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copied"))


@pytest.fixture(scope="session")
def opened(prepared: Path) -> Dataset:
    return open_dataset(prepared)
