"""From what the user names to streams of documents: files, folders, Hugging Face datasets, stdlib."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from remoe.errors import DataError
from remoe.lab.data.documents import Columns, Document
from remoe.lab.data.readers import READERS, known_suffix

Signature = list[list[str | int]]  # one entry a file: path, size in bytes, modification time in nanoseconds


class Source(Protocol):
    """A named origin of documents that can be read as often as needed, in the same order each time."""

    name: str

    def signature(self) -> Signature:
        """What tells whether the source has changed since an earlier run."""
        ...

    def documents(self) -> Iterator[Document]:
        """A new pass over the documents; raises DataError where they cannot be read."""
        ...

    def note(self) -> str | None:
        """A remark about the last pass for the log, or None."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Text files, JSON lines and Parquet files, each with the domain its place gives it."""

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
            yield from READERS[suffix](path, self.columns, domain)

    def note(self) -> str | None:
        return None


def resolve_source(name: str, columns: Columns) -> Source:
    """Find out what `name` stands for: `stdlib`, `hf:...`, a file or a folder.

    Raises DataError for a path that does not exist, a file of unknown type or a folder without data.
    """
    if name == "stdlib":
        from remoe.lab.data.stdlib import StdlibSource

        return StdlibSource()
    path = Path(name)
    if name.startswith("hf:") or is_saved_dataset(path):
        from remoe.lab.data.huggingface import resolve_dataset

        return resolve_dataset(name, columns)
    if path.is_dir():
        return _folder_source(name, path, columns)
    if not path.exists():
        raise DataError(f"{name}: no such file or folder")
    suffix = known_suffix(path)
    if suffix is None:
        raise DataError(f"{name}: unknown type of file (known: {', '.join(sorted(READERS))})")
    return FileSource(name, ((path, path.name[: -len(suffix)]),), columns)


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `datasets` wrote with save_to_disk."""
    return path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def files_signature(paths: list[Path]) -> Signature:
    """Path, size (bytes) and time of change (ns) of each file; raises DataError if one is gone."""
    entries: Signature = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        entries.append([path.as_posix(), status.st_size, status.st_mtime_ns])
    return entries


def walk_files(folder: Path) -> list[Path]:
    """All files below `folder`, and in folders elsewhere that links lead to, in an order that depends on names only.

    Hidden ones are left out, and a second link to the same.
    """
    found: list[Path] = []
    top, walked = Path(os.path.realpath(folder)), set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        real = Path(os.path.realpath(root))
        inside = real.is_relative_to(top) and Path(root) != folder
        if real in walked or (inside and real != top / Path(root).relative_to(folder)):
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}; make it readable, or name what is to be read") from error


def _folder_source(name: str, folder: Path, columns: Columns) -> FileSource:
    found = walk_files(folder)
    files = tuple((path, _folder_domain(folder, path)) for path in found if known_suffix(path))
    if not files:
        raise DataError(f"{name}: no files to read in this folder (known: {', '.join(sorted(READERS))})")
    return FileSource(name, files, columns, tuple(path for path in found if not known_suffix(path)))


def _folder_domain(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).parts
    if len(parts) > 1:
        return parts[0]
    suffix = known_suffix(path)
    assert suffix is not None
    return folder.resolve().name if suffix == ".txt" else path.name[: -len(suffix)]
