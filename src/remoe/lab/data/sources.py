"""Sources of documents, by the names that users give: files, folders, Hugging Face datasets, stdlib."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from remoe.errors import DataError
from remoe.lab.data.documents import (
    READERS,
    ROWS_PER_BATCH,
    Columns,
    Document,
    arrow_documents,
    columns_to_read,
    known_suffix,
    read_text,
)
from remoe.lab.data.stdlib import StdlibSource
from remoe.lab.files import Signature, files_signature, walk_files

if TYPE_CHECKING:
    from datasets import Dataset


ABOUT = "readme.md"  # tells of a folder's texts and is none of them
# What only folders of this package and of models have: datasets, runs, exports.
_NOT_TEXT = ("dataset.json", "preparation.json", "tokenizer_config.json", "tokenizer/tokenizer_config.json")


class Source(Protocol):
    """A named origin of documents that can be read any number of times, always in the same order."""

    name: str

    def signature(self) -> Signature:
        """A value that differs if the source has changed since an earlier run."""
        ...

    def documents(self) -> Iterator[Document]:
        """A new pass over the documents; raises DataError where they cannot be read."""
        ...

    def note(self) -> str | None:
        """A remark for the log about the last pass, or None."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Text files, JSON lines and Parquet files, each with a default domain that depends on its place."""

    name: str
    files: tuple[tuple[Path, str], ...]
    columns: Columns
    left_out: tuple[Path, ...] = ()  # files of other kinds in the same folder

    def signature(self) -> Signature:
        return files_signature([path for path, _ in self.files])

    def documents(self) -> Iterator[Document]:
        for path, domain in self.files:
            suffix = known_suffix(path)
            assert suffix is not None
            try:
                yield from READERS[suffix](path, self.columns, domain)
            except MemoryError:
                raise DataError(f"{path}: too little memory to read it; divide its texts into shorter ones") from None

    def note(self) -> str | None:
        return None


@dataclass(frozen=True)
class DatasetSource:
    """One split of a Hugging Face dataset, read from its memory-mapped Arrow files."""

    name: str
    dataset: "Dataset"
    identity: Signature
    domain: str
    columns: Columns

    def signature(self) -> Signature:
        return self.identity

    def documents(self) -> Iterator[Document]:
        names = columns_to_read(self.columns, self.dataset.features.arrow_schema, self.name)
        tables = self.dataset.select_columns(names).with_format("arrow").iter(ROWS_PER_BATCH)
        return arrow_documents(tables, self.columns, self.domain, self.name)

    def note(self) -> str | None:
        return None


def resolve_source(name: str, columns: Columns) -> Source:
    """Find the source that `name` stands for: `stdlib`, `hf:...`, a file or a folder.

    Raises DataError for a path that does not exist, a file of unknown type or a folder without data.
    """
    if name == "stdlib":
        return StdlibSource()
    path = Path(name)
    if name.startswith("hf:") or is_saved_dataset(path):
        return resolve_dataset(name, columns)
    if path.is_dir():
        return _folder_source(name, path, columns)
    if not path.exists():
        raise DataError(f"{name}: no such file or folder")
    check_file(path)
    suffix = known_suffix(path)
    if suffix is None:
        raise DataError(f"{name}: unknown file type (known: {', '.join(sorted(READERS))})")
    return FileSource(name, ((path, path.name[: -len(suffix)]),), columns)


def resolve_dataset(name: str, columns: Columns) -> DatasetSource:
    """Open `hf:NAME[:CONFIG[:SPLIT]]` (split `train` by default) or a folder written by save_to_disk.

    NAME may be such a folder too. Raises DataError if `datasets` is not installed, the hub cannot be
    reached, or it has no such dataset, configuration or split.
    """
    target, config, split = split_name(name) if name.startswith("hf:") else (name, "", "")
    check_package(name)
    if is_saved_dataset(Path(target)):
        return _saved_source(name, Path(target), config, split, columns)
    if Path(target).exists():
        raise DataError(f"{name}: {target} was not written by save_to_disk; name its files without `hf:`")
    return _hub_source(name, target, config, split or "train", columns)


def split_name(name: str) -> tuple[str, str, str]:
    """NAME, CONFIG and SPLIT of `hf:NAME[:CONFIG[:SPLIT]]`, empty where not given; DataError without NAME."""
    target, _, rest = name.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    if not target:
        raise DataError(f"{name}: no dataset named; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return target, config, split


def check_package(name: str) -> None:
    """Raise DataError, about the source of this name, if `datasets` is not installed."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(f"{name}: needs the package `datasets`: pip install 'remoe[datasets]'") from None


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `datasets` wrote with save_to_disk."""
    return path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def is_raw(name: str) -> bool:
    """Whether `--data` names text, in a file, in a folder or on the hub, rather than a dataset, a run or a model."""
    path = Path(name)
    if not path.is_dir():
        return path.exists() or name == "stdlib" or name.startswith("hf:")
    return not any((path / mark).exists() for mark in _NOT_TEXT)


def _saved_source(name: str, folder: Path, config: str, split: str, columns: Columns) -> DatasetSource:
    from datasets import DatasetDict, load_from_disk

    if config:
        raise DataError(f"{name}: a saved dataset has no configurations; write hf:{folder}::SPLIT for a split")
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises errors of Arrow, JSON or the file system
        raise DataError(f"{name}: cannot be opened: {first_line(error)}") from error
    if isinstance(dataset, DatasetDict):
        chosen = split or "train"
        if chosen not in dataset:
            raise DataError(f"{name}: no split {chosen!r}; write hf:{folder}::SPLIT (has {', '.join(dataset)})")
        dataset = dataset[chosen]
    elif split:
        raise DataError(f"{name}: {folder} holds a single split, so none can be chosen")
    identity = files_signature(walk_files(folder))
    return DatasetSource(name, dataset, identity, folder.resolve().name, columns)


def _hub_source(name: str, target: str, config: str, split: str, columns: Columns) -> DatasetSource:
    from datasets import load_dataset

    try:
        dataset = load_dataset(target, config or None, split=split)
    except Exception as error:  # the hub, its client and the dataset's own files share no base class of errors
        raise DataError(f"{name}: cannot be loaded from the Hugging Face hub: {first_line(error)}") from error
    files = sorted(dataset.info.download_checksums or {})  # their addresses name the revision
    identity: Signature = [[name, dataset.num_rows, 0], *([address, 0, 0] for address in files)]
    return DatasetSource(name, dataset, identity, target.rstrip("/").rsplit("/", 1)[-1], columns)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _folder_source(name: str, folder: Path, columns: Columns) -> FileSource:
    found = walk_files(folder)
    kept = [path for path in found if known_suffix(path) and path.name.lower() != ABOUT]
    for path in kept:
        check_file(path)
    files = tuple((path, _folder_domain(folder, path)) for path in kept)
    if not files:
        raise DataError(f"{name}: this folder has no files to read (known: {', '.join(sorted(READERS))})")
    return FileSource(name, files, columns, tuple(sorted(set(found) - set(kept))))


def check_file(path: Path) -> None:
    """Raise DataError for what cannot be read any number of times, and for a name that JSON cannot hold."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file but a pipe, a socket or a device")
    check_name(str(path))


def check_name(path: str) -> None:
    """Raise DataError for the name of a file or folder that is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}: this name is not UTF-8; rename it") from None


def _folder_domain(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).parts
    if len(parts) > 1:
        return parts[0]
    suffix = known_suffix(path)
    assert suffix is not None
    return folder.resolve().name if READERS[suffix] is read_text else path.name[: -len(suffix)]
