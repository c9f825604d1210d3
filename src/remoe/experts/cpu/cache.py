"""Compiled libraries on disk, in a folder that is this user's alone; a file's name has the hash of its content.

Code that anyone else could have written, or that is not whole, is never loaded: it is built again. Where the folder
cannot be used, a library is built for this process only.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SCRATCH = "building-"


def find_library(identity: str) -> ctypes.CDLL | None:
    """The library that is kept under this name, loaded; None without one that is whole and this user's."""
    folder = _folder()
    if _distrust(folder) is not None:
        return None
    return next((library for path in _kept(folder, identity) if (library := _load(path)) is not None), None)


def is_kept(identity: str) -> bool:
    """Whether `find_library` would find one."""
    folder = _folder()
    if _distrust(folder) is not None:
        return False
    for path in _kept(folder, identity):
        if (descriptor := _opened(path)) is not None:
            os.close(descriptor)
            return True
    return False


def make_library(identity: str, build: Callable[[Path], Path]) -> ctypes.CDLL:
    """Builds a library and loads it; while another process builds one of this name, waits for that instead.

    Args:
        identity: a file name; names of different contents must differ.
        build: gets an empty folder to build in, and returns the file.

    Raises:
        OSError: if the library cannot be written or loaded; also whatever `build` raises.
    """
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _distrust(folder)
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
    if reason is not None:
        logger.warning("the compiled CPU kernels are built for this process only: %s", reason)
        with tempfile.TemporaryDirectory(prefix="remoe-") as scratch:
            return ctypes.CDLL(str(build(Path(scratch))))
    with _locked(folder) as alone:
        if (library := find_library(identity)) is not None:
            return library
        if alone:
            for leftover in folder.glob(f"{_SCRATCH}*"):  # of builds that were killed
                shutil.rmtree(leftover, ignore_errors=True)
        for damaged in _kept(folder, identity):
            logger.warning("%s is damaged, or others may write to it: it is built again", damaged)
            damaged.unlink()
        path = _build(folder, identity, build)
    if (library := _load(path)) is None:
        raise OSError(f"{path} changed while it was loaded")
    logger.info("built the CPU kernels: %s", path)
    return library


def _build(folder: Path, identity: str, build: Callable[[Path], Path]) -> Path:
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        built = build(Path(scratch))
        built.chmod(0o700)
        with built.open("r+b") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        path = folder / f"{identity}-{digest}.so"
        built.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return path


def _folder() -> Path:
    """A folder for each user, so that users can share REMOE_CACHE; absolute, as the system's loader needs it."""
    if given := os.environ.get("REMOE_CACHE"):
        cache = Path(given).expanduser()
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe"
    return cache.absolute() / (f"kernels-{os.geteuid()}" if hasattr(os, "geteuid") else "kernels")


def _kept(folder: Path, identity: str) -> list[Path]:
    return sorted(path for path in folder.glob("*.so") if path.name.startswith(f"{identity}-"))


def _distrust(folder: Path) -> str | None:
    """Why the files in this folder may be another's work; None for a folder of this user's, and for none."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder"
    return _shared(folder, status)


def _shared(path: Path, status: os.stat_result) -> str | None:
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    return f"other users may write to {path}" if status.st_mode & _OTHERS_WRITE else None


def _load(path: Path) -> ctypes.CDLL | None:
    """The library of this file, unless `_opened` refuses it."""
    if (descriptor := _opened(path)) is None:
        return None
    # Loaded by its descriptor, the file is the one that was checked. It stays open: the loader knows a library by its
    # name, which another descriptor of the same number would have.
    same_file = Path(f"/proc/self/fd/{descriptor}")
    return ctypes.CDLL(str(same_file if same_file.exists() else path))


def _opened(path: Path) -> int | None:
    """An open descriptor of the file; None unless it is this user's, and its content has the hash in its name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and _shared(path, status) is None:
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == path.stem.rpartition("-")[2]:
                return descriptor
    os.close(descriptor)
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keeps other processes' builds waiting; yields whether it does, which some file systems cannot."""
    if os.name != "posix":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)
