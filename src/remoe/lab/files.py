"""Files on disk: atomic writes, locks, signatures that show changes, and walks through folders.

An atomic write that is killed at any moment leaves either the old file or the new one, never part of one.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from remoe.errors import ConfigError, DataError, RemoeError

Signature = list[list[str | int]]  # one entry per file: path, size in bytes, modification time in nanoseconds

TEMPORARY = ".remoe.tmp"
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def atomic_write(path: Path, content: bytes, *, error: type[RemoeError] = DataError) -> None:
    """Write a whole file, through to the disk; raises `error` if that fails."""
    with replacing(path, error=error) as temporary:
        temporary.write_bytes(content)


def temporary_name(name: str) -> str:
    """Name of the hidden folder in which the file or folder `name` is written; leftovers of a kill are deleted."""
    return f".{name}{TEMPORARY}"


@contextmanager
def replacing(path: Path, *, error: type[RemoeError] = DataError) -> Iterator[Path]:
    """Yield a path at which the block writes a file or a folder; it becomes `path` when the block ends.

    A file replaces the one at `path`. A folder needs `path` to be free or an empty folder. If the block fails,
    nothing changes. Raises `error` if writing fails.
    """
    # a separate folder, because safetensors, when killed, leaves a file with a random name next to its own
    workspace = path.with_name(temporary_name(path.name))
    written = workspace / path.name
    with disk_errors(path, error=error):
        remove(workspace)
        workspace.mkdir()
        try:
            yield written
            publish(written, path)
        finally:
            remove(workspace)


def publish(written: Path, path: Path) -> None:
    """Move a file or a folder to `path` in one step, through to the disk; raises OSError if that fails.

    A new folder, in which `written` is, decides the modes of the files and folders.
    """
    # The umask decides, as it has for the new folder: safetensors lets only the owner read its files, and a copied
    # folder has the mode of the first.
    mode = stat.S_IMODE(written.parent.stat().st_mode)
    for part in (written, *(written.rglob("*") if written.is_dir() else ())):
        if not part.is_symlink():
            part.chmod(mode if part.is_dir() else mode & 0o666)
        sync(part)
    os.replace(written, path)
    sync(path.parent)


@contextmanager
def new_folder(path: Path, *, error: type[RemoeError] = DataError) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `path` when the block ends.

    Raises ConfigError as `check_new_folder` does, and `error` if writing fails.
    """
    check_new_folder(path)
    with disk_errors(path, error=error):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, error=error) as folder:
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()


def check_new_folder(path: Path) -> None:
    """Raise ConfigError unless a whole folder can be written to `path`: nothing is there, or an empty folder."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a link, which cannot be replaced; name the folder itself")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} already exists and is not an empty folder")
    if path.resolve() == Path.cwd():
        raise ConfigError(f"{path} is the working directory, which cannot be replaced; name another folder")
    if os.path.ismount(path):  # Path.is_mount takes "." for a mount point
        raise ConfigError(f"{path} is a mount point, which cannot be replaced; name a folder inside it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):  # replacing a folder writes to its parent
        raise ConfigError(f"{path} cannot be written: no write permission in {parent}")


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists; of a link, only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Remove a file or a folder as `remove` does; a kill never leaves part of a folder under its name."""
    if path.exists():
        doomed = path.with_name(temporary_name(path.name))
        remove(doomed)
        os.replace(path, doomed)
        remove(doomed)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk, where the system can do that."""
    if path.is_dir() and os.name != "posix":
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot sync a folder; a rename in it is atomic all the same
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, *, error: type[RemoeError] = DataError) -> Iterator[None]:
    """Turn a disk failure, raised by Python or by a Rust library, into an `error` of one line."""
    try:
        yield
    except RemoeError:
        raise
    except Exception as cause:
        number = cause.errno if isinstance(cause, OSError) else _rust_errno(cause)
        if number is None:
            raise
        hint, other = "", getattr(cause, "filename", None)
        if isinstance(other, str) and not Path(other).is_relative_to(path.parent):
            hint = f": {other}"  # perhaps a file that the block reads
        if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            hint = "; finished work is kept: free some space and run the same command again"
        raise error(f"{path}: cannot be written: {os.strerror(number)}{hint}") from cause


@contextmanager
def locked(folder: Path, busy: Exception | None) -> Iterator[None]:
    """Keep other processes out of `folder` during the block.

    If another process is in it, raise `busy`, or wait if that is None. Does nothing except on POSIX systems.
    """
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(descriptor, wait=busy is None):
            assert busy is not None
            raise busy
        yield
    finally:
        os.close(descriptor)


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file against other processes; returns False if another process has it.

    The lock ends when the file is closed here and in every child process that inherited it. Always True except on
    POSIX systems, where alone a file can be locked like this.
    """
    return os.name != "posix" or _lock(file.fileno(), wait=False)


def files_signature(paths: list[Path]) -> Signature:
    """Path, size in bytes and modification time in ns of each file; raises DataError if one is gone."""
    entries: Signature = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        entries.append([path.as_posix(), status.st_size, status.st_mtime_ns])
    return entries


def walk_files(folder: Path) -> list[Path]:
    """All files in `folder` and below, also behind links to other folders, in an order set by their names alone.

    Hidden files and folders are skipped, and so is every further link to a folder already visited. Raises
    DataError for a folder that cannot be read.
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
    raise DataError(f"{error.filename}: {error.strerror}; make it readable, or name other sources") from error


def _lock(descriptor: int, *, wait: bool) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _rust_errno(error: Exception) -> int | None:
    # safetensors and tokenizers report the system's error as text only
    match = _RUST_ERROR.search(str(error))
    return int(match.group(1)) if match else None
