"""Hugging Face datasets as sources: from the hub, or from a folder written by save_to_disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from remoe.errors import DataError
from remoe.lab.data.documents import Columns, Document
from remoe.lab.data.readers import ROWS_PER_BATCH, arrow_documents, wanted_columns
from remoe.lab.data.sources import Signature, files_signature, is_saved_dataset, walk_files

if TYPE_CHECKING:
    from datasets import Dataset


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
        names = wanted_columns(self.columns, self.dataset.features.arrow_schema, self.name)
        tables = self.dataset.select_columns(names).with_format("arrow").iter(ROWS_PER_BATCH)
        return arrow_documents(tables, self.columns, self.domain, self.name)

    def note(self) -> str | None:
        return None


def resolve_dataset(name: str, columns: Columns) -> DatasetSource:
    """Open `hf:NAME[:CONFIG[:SPLIT]]` (split `train` unless given) or a folder written by save_to_disk.

    NAME may be such a folder too. Raises DataError if `datasets` is not installed, the hub cannot be
    reached, or it has no such dataset, configuration or split.
    """
    if name.startswith("hf:"):
        target, _, rest = name.removeprefix("hf:").partition(":")
        config, _, split = rest.partition(":")
    else:
        target, config, split = name, "", ""
    if not target:
        raise DataError(f"{name}: no dataset named; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets  # noqa: F401
    except ImportError:
        install = "pip install -e '.[datasets]' in this project's folder"
        raise DataError(f"{name}: needs the package `datasets`: {install}") from None
    if is_saved_dataset(Path(target)):
        return _saved_source(name, Path(target), config, split, columns)
    if Path(target).exists():
        raise DataError(f"{name}: {target} was not written by save_to_disk; name files without `hf:`")
    return _hub_source(name, target, config, split or "train", columns)


def _saved_source(name: str, folder: Path, config: str, split: str, columns: Columns) -> DatasetSource:
    from datasets import DatasetDict, load_from_disk

    if config:
        raise DataError(f"{name}: a saved dataset has no configurations; write hf:{folder}::SPLIT for a split")
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # a damaged folder shows itself by errors of Arrow, JSON or the file system
        raise DataError(f"{name}: cannot be opened: {_reason(error)}") from error
    if isinstance(dataset, DatasetDict):
        wanted = split or "train"
        if wanted not in dataset:
            raise DataError(f"{name}: no split {wanted!r}; write hf:{folder}::SPLIT (has {', '.join(dataset)})")
        dataset = dataset[wanted]
    elif split:
        raise DataError(f"{name}: {folder} is a single split, so none can be chosen")
    identity = files_signature(walk_files(folder))
    return DatasetSource(name, dataset, identity, folder.resolve().name, columns)


def _hub_source(name: str, target: str, config: str, split: str, columns: Columns) -> DatasetSource:
    from datasets import load_dataset

    try:
        dataset = load_dataset(target, config or None, split=split)
    except Exception as error:  # the hub, its client and the dataset's own files have no common base of errors
        raise DataError(f"{name}: cannot be loaded from the Hugging Face hub: {_reason(error)}") from error
    files = sorted(dataset.info.download_checksums or {})  # their addresses name the revision
    identity: Signature = [[name, dataset.num_rows, 0], *([address, 0, 0] for address in files)]
    return DatasetSource(name, dataset, identity, target.rstrip("/").rsplit("/", 1)[-1], columns)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
