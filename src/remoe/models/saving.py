"""The modes of the files that `save_pretrained` writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def umask_decides(folder: str | Path) -> Iterator[None]:
    """Gives the weights that the block writes into a folder the mode of any new file: safetensors takes 0600.

    Args:
        folder: it may not exist yet. Files that the block does not write keep their modes.
    """
    folder = Path(folder)
    before = _versions(folder)
    yield
    written = [path for path, version in _versions(folder).items() if before.get(path) != version]
    if not written:
        return
    mode = _mode_of_new_files(folder)
    for path in written:
        path.chmod(mode)


def _versions(folder: Path) -> dict[Path, tuple[int, int]]:
    status = {path: path.stat() for path in folder.glob("*.safetensors") if path.is_file()}
    return {path: (entry.st_ino, entry.st_mtime_ns) for path, entry in status.items()}


def _mode_of_new_files(folder: Path) -> int:
    # A folder's mode, because to read the umask a process must change it, for all of its threads.
    probe = folder / f".remoe.mode.{os.getpid()}"
    probe.mkdir()
    try:
        return probe.stat().st_mode & 0o666
    finally:
        probe.rmdir()
