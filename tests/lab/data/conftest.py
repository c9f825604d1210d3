"""Small corpora with fixed seeds, and a prepared dataset that several files of tests open."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe.lab.data import Dataset, PrepareOptions, Split, open_dataset, prepare

WORDS = [
    "the",
    "a",
    "of",
    "ReLU",
    "router",
    "expert",
    "gate",
    "model",
    "déjà",
    "你好",
    "🙂",
    "x=1;",
    "return\n",
]

TextMaker = Callable[..., list[str]]


def make_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """`count` different texts of about `words` words."""
    generator = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(generator.choices(WORDS, k=words)) for i in range(count)]


def write_jsonl(path: Path, texts: list[str], domain: str | None = None) -> Path:
    rows = [{"text": text} if domain is None else {"text": text, "domain": domain} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def document_texts(dataset: Dataset, split: Split) -> list[tuple[str, str]]:
    """Domain and decoded text of each document, in order; checks that each ends with EOS."""
    tokenizer = dataset.load_tokenizer()
    found = []
    for shard in split.shards:
        for number, domain in enumerate(shard.document_domain.tolist()):
            first, last = shard.document_offsets[number : number + 2].tolist()
            tokens = shard.tokens[first:last].tolist()
            assert tokens[-1] == dataset.eos_token_id
            assert dataset.eos_token_id not in tokens[:-1]
            found.append((dataset.domains[domain], tokenizer.decode(tokens[:-1])))
    return found


def small_options(out: Path, *sources: Path | str, **changes: object) -> PrepareOptions:
    """Options for a preparation that takes a fraction of a second."""
    settings: dict = {"vocab_size": 300, "shard_tokens": 2000, "validation_fraction": 0.1, "quiet": True}
    return PrepareOptions(sources=tuple(str(name) for name in sources), out=out, **(settings | changes))


@pytest.fixture(scope="session", name="make_texts")
def _make_texts() -> TextMaker:
    return make_texts


@pytest.fixture(scope="session", name="write_jsonl")
def _write_jsonl() -> Callable[..., Path]:
    return write_jsonl


@pytest.fixture(scope="session", name="document_texts")
def _document_texts() -> Callable[..., list[tuple[str, str]]]:
    return document_texts


@pytest.fixture(scope="session", name="small_options")
def _small_options() -> Callable[..., PrepareOptions]:
    return small_options


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three domains, mixed in order, in several shards; tests must not change it."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = make_texts(120, seed=1)
    rows = [{"text": text, "domain": "abc"[i * 7 % 11 % 3]} for i, text in enumerate(texts)]
    source = folder / "mixed.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(small_options(folder / "data", source))


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copied"))


@pytest.fixture(scope="session")
def opened(prepared: Path) -> Dataset:
    return open_dataset(prepared)
