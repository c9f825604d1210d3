"""Files and folders are written whole or not at all; locks keep other processes out."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from remoe.errors import CheckpointError, ConfigError, DataError
from remoe.lab import files
from remoe.lab.files import atomic_write, check_new_folder, new_folder, remove_whole, temporary_name, try_lock


def test_a_folder_within_a_folder_can_be_entered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").write_text("x")
        (folder / "templates" / "tool.jinja").chmod(0o600)
    assert (out / "templates").stat().st_mode & 0o111 == out.stat().st_mode & 0o111
    assert (out / "templates" / "tool.jinja").stat().st_mode & 0o777 == out.stat().st_mode & 0o666


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "private" / "vocabulary").write_text("x")
    (tmp_path / "private" / "vocabulary").chmod(0o400)
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            shutil.copytree(tmp_path / "private", folder, dirs_exist_ok=True)
            shutil.copytree(tmp_path / "private", folder / "tokenizer")
            save_file({"x": np.zeros(2)}, folder / "model.safetensors")
        atomic_write(tmp_path / "page.html", b"x")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    modes = {path: path.stat().st_mode & 0o777 for path in (out, *out.rglob("*"), tmp_path / "page.html")}
    assert len(modes) == 6
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_like_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.tmp").mkdir()
    with new_folder(tmp_path / "model"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.tmp"]


def test_an_error_names_the_file_that_it_is_about(tmp_path: Path) -> None:
    def read() -> None:
        with new_folder(tmp_path / "out" / "model"):
            (tmp_path / "weights").read_bytes()

    with pytest.raises(DataError, match=r"out/model: cannot be written: No such file.*: .*weights$"):
        read()


def test_what_cannot_be_replaced_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="is a link"):
        check_new_folder(tmp_path / "link")
    check_new_folder(tmp_path / "real")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match="no write permission in"):
        check_new_folder(tmp_path / "new" / "deep")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "real")
    with pytest.raises(ConfigError, match="is a mount point"):
        check_new_folder(tmp_path / "real")


def test_an_error_has_the_type_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="out: cannot be written: Not a directory"):
        atomic_write(tmp_path / "file" / "out", b"content", error=CheckpointError)


def test_a_file_is_removed_with_what_a_kill_left_of_it(tmp_path: Path) -> None:
    for name in ("step-1", temporary_name("step-1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("x")
    remove_whole(tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []
    remove_whole(tmp_path / "step-1")


@pytest.mark.skipif(os.name != "posix", reason="files are locked on POSIX systems only")
def test_a_file_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as first, path.open("ab") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)


def test_what_is_synced_is_open_for_writing_where_the_system_is_not_posix(tmp_path: Path, monkeypatch) -> None:
    import fcntl

    class Windows:
        name = "nt"

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(files, "os", Windows())
    (tmp_path / "file").write_text("content")
    files.sync(tmp_path / "file")
    files.sync(tmp_path)
    assert (tmp_path / "file").read_text() == "content"
