"""Writing so that a kill at any moment leaves either the old file or the new one, never half of one."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remoe.errors import ConfigError, DataError

TEMPORARY = ".remoe.tmp"
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def atomic_write(path: Path, content: bytes) -> None:
    """Write a whole file through to the disk; raises DataError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def temporary_name(name: str) -> str:
    """What a file or folder is called until it is whole; removed where a kill has left it, so nobody else's name."""
    return f".{name}{TEMPORARY}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to, which becomes `path` when the block ends.

    A folder must not be there yet. Raises DataError where writing fails.
    """
    # a folder to write in, because safetensors leaves a file of a random name beside its own when killed
    workspace = path.with_name(temporary_name(path.name))
    written = workspace / path.name
    with disk_errors(path):
        remove(workspace)
        workspace.mkdir()
        try:
            yield written
            for part in (written, *(written.rglob("*") if written.is_dir() else ())):
                if part.is_file():
                    part.chmod(workspace.stat().st_mode & 0o666)  # safetensors lets only the owner read
                _sync(part)
            os.replace(written, path)
            _sync(path.parent)
        finally:
            remove(workspace)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `path` when the block ends.

    Raises ConfigError as `check_new_folder`, DataError where writing fails.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as folder:
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()


def check_new_folder(path: Path) -> None:
    """Raises ConfigError unless a folder can be written whole at `path`: nothing is there, or an empty folder."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a link, which cannot be replaced: name the folder itself")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} already exists and is not an empty folder")
    if path.resolve() == Path.cwd():
        raise ConfigError(f"{path} is the working directory, which cannot be replaced: name another folder")
    if os.path.ismount(path):  # Path.is_mount takes "." for one
        raise ConfigError(f"{path} is a mount point, which cannot be replaced: name a folder in it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):  # a folder is replaced in the one around it
        raise ConfigError(f"{path} cannot be written: no permission to write in {parent}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the disk, raised by Python or by a Rust library, into one line of DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _rust_errno(error)
        if number is None:
            raise
        hint, other = "", getattr(error, "filename", None)
        if isinstance(other, str) and not Path(other).is_relative_to(path.parent):
            hint = f": {other}"  # read inside the block, perhaps
        if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            hint = "; what was finished is kept: make room and run the same command again"
        raise DataError(f"{path}: cannot be written: {os.strerror(number)}{hint}") from error


@contextmanager
def locked(folder: Path, busy: Exception | None) -> Iterator[None]:
    """Keep other processes out of `folder` meanwhile; if one is in it, raises `busy`, or waits where that is None."""
    if os.name != "posix":  # elsewhere a folder cannot be locked
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise busy from None
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there; a link is removed, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _rust_errno(error: Exception) -> int | None:
    # safetensors and tokenizers pass the system's error on as text only
    match = _RUST_ERROR.search(str(error))
    return int(match.group(1)) if match else None


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
