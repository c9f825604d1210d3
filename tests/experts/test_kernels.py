"""Building the compiled kernels, and doing without them."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch

from remoe.errors import ConfigError
from remoe.experts import run_experts
from remoe.experts.cpu import build as kernels
from remoe.experts.cpu import cache
from remoe.routing.assignment import Assignment


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library loaded yet, and an empty cache."""
    caches = (kernels._library, kernels.compiled_kernels, kernels.compiled_passes)
    for function in caches:
        function.cache_clear()
    monkeypatch.setenv("REMOE_CACHE", str(tmp_path))
    yield tmp_path
    for function in caches:
        function.cache_clear()


@pytest.fixture(scope="module")
def with_kernels():
    return output()


def output():
    torch.manual_seed(0)
    active = torch.rand(9, 3) < 0.5
    assignment = Assignment.from_gates(torch.rand(9, 3), active)
    return run_experts(torch.randn(9, 6), torch.randn(3, 8, 6), torch.randn(3, 6, 4), assignment, "cpu")


@pytest.mark.slow
def test_built_once_and_found_again(fresh, monkeypatch):
    if not kernels._compilers():
        assert not kernels.to_be_built()
        pytest.skip("no compiler here")
    assert kernels.to_be_built()
    assert kernels.compiled_kernels(torch.float32) is not None
    assert not kernels.to_be_built()
    (library,) = fresh.glob("*/*")
    before = library.stat().st_mtime_ns
    for function in (kernels._library, kernels.compiled_kernels):
        function.cache_clear()
    assert kernels.compiled_kernels(torch.bfloat16) is not None
    assert library.stat().st_mtime_ns == before
    library.unlink()
    assert kernels.to_be_built()
    monkeypatch.setenv("REMOE_KERNELS", "0")
    assert not kernels.to_be_built()


def test_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("REMOE_KERNELS", "0")
    assert kernels.compiled_kernels(torch.float32) is None
    assert kernels.compiled_passes(torch.float32) is None
    assert not list(fresh.iterdir())


def test_a_product_that_is_not_there_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("REMOE_PRODUCT", "mlk")
    with pytest.raises(ConfigError, match="unknown REMOE_PRODUCT 'mlk'; choose one of: own"):
        kernels._library_gemm(torch.float32)
    monkeypatch.delenv("REMOE_PRODUCT")
    for amx in (True, False):
        monkeypatch.setattr(kernels, "has_amx", lambda amx=amx: amx)
        found = kernels._library_gemm(torch.bfloat16)
        assert (found is not None) == (amx and kernels.is_intel() and torch.backends.mkl.is_available())
    monkeypatch.setattr(kernels, "has_amx", lambda: True)
    with monkeypatch.context() as patch:  # another build of PyTorch may not have MKL's product in bfloat16
        patch.setattr(kernels.ctypes, "CDLL", lambda path: SimpleNamespace())
        assert kernels._library_gemm(torch.bfloat16) is None
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setenv("REMOE_PRODUCT", "mkl")
    with pytest.raises(ConfigError, match="unknown REMOE_PRODUCT 'mkl'; choose one of: own"):
        kernels._library_gemm(torch.float32)
    monkeypatch.delenv("REMOE_PRODUCT")
    assert kernels._library_gemm(torch.float32) is None
    library = SimpleNamespace(experts_forward_bfloat16=None, use_library_bfloat16=lambda gemm: None)
    monkeypatch.setattr(kernels, "_library", lambda: library)
    assert kernels.compiled_passes(torch.bfloat16) is None  # oneDNN's products are faster than ours


@pytest.mark.parametrize("trouble", ["none", "fails"])
def test_without_a_working_compiler_the_result_is_the_same(with_kernels, fresh, monkeypatch, tmp_path, caplog, trouble):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such processor >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: str(compiler) if trouble == "fails" else None)
    with caplog.at_level(logging.INFO, logger="remoe.experts.cpu.build"):
        assert reference.relative_error(output(), with_kernels) < 1e-5
    words = "no such processor" if trouble == "fails" else "no C++ compiler"
    assert sum(words in record.getMessage() for record in caplog.records) == 1


def test_linked_to_torchs_own_openmp_whatever_other_packages_bring(monkeypatch):
    own = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    system, site = Path("/usr/lib/libgomp.so.1"), Path(torch.__file__).parent.parent
    strange = site / "a.libs" / "libgomp-a34b3233.so.1"
    others = {strange, Path("/packages/b/libopenblas.so")}
    for loaded, chosen in (({own, system}, own), ({site / "torch.libs" / own.name}, site / "torch.libs" / own.name)):
        monkeypatch.setattr(kernels, "_loaded_files", lambda loaded=loaded: {*others, *loaded})
        assert kernels._openmp_runtime() == str(chosen)
    monkeypatch.setattr(kernels, "_loaded_files", lambda: {*others, system})
    assert kernels._openmp_runtime() == str(system)
    monkeypatch.setattr(kernels, "_loaded_files", lambda: others)
    assert kernels._openmp_runtime() == str(strange)
    monkeypatch.setattr(kernels, "_loaded_files", set)
    assert kernels._openmp_runtime() is None


class Built:
    """Builds a library of one constant with the machine's compiler, and counts how often."""

    def __init__(self, answer=42):
        self.answer, self.times = answer, 0

    def __call__(self, scratch):
        self.times += 1
        source, library = scratch / "answer.cpp", scratch / "answer.so"
        source.write_text(f'extern "C" int answer() {{ return {self.answer}; }}')
        subprocess.run([kernels._compilers()[0], "-shared", "-fPIC", source, "-o", library], check=True)
        return library


@pytest.fixture
def built(fresh):
    if not kernels._compilers():
        pytest.skip("no compiler here")
    return Built()


def damage_nothing(library):
    pass


def cut_to_5000_bytes(library):
    os.truncate(library, 5000)


def cut_to_nothing(library):
    os.truncate(library, 0)


def flip_a_bit(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def let_others_write(library):
    library.chmod(0o777)


def put_a_link(library):
    elsewhere = library.with_suffix(".elsewhere")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def put_a_pipe(library):
    library.unlink()
    os.mkfifo(library)


DAMAGES = (cut_to_5000_bytes, cut_to_nothing, flip_a_bit, let_others_write, put_a_link, put_a_pipe)


@pytest.mark.parametrize("damage", [damage_nothing, *DAMAGES], ids=lambda damage: damage.__name__)
def test_a_kept_library_that_is_not_whole_and_ours_is_built_again(built, fresh, damage):
    cache.make_library("test", built)
    (library,) = fresh.glob("*/test-*.so")
    assert library.stem.removeprefix("test-") == hashlib.sha256(library.read_bytes()).hexdigest()
    damage(library)
    harmed = damage is not damage_nothing
    assert cache.is_kept("test") is not harmed
    assert (cache.find_library("test") is None) is harmed
    assert cache.make_library("test", built).answer() == 42
    assert built.times == 1 + harmed
    assert cache.find_library("test").answer() == 42
    assert [path.is_file() and not path.is_symlink() for path in fresh.glob("*/test-*.so")] == [True]


@pytest.mark.parametrize("others", ["may write", "own it", "made a link"])
def test_a_folder_that_others_can_fill_is_neither_read_nor_written(built, fresh, monkeypatch, caplog, others):
    planted = cache._folder()
    cache.make_library("test", Built(answer=666))
    if others == "may write":
        planted.chmod(0o777)
    elif others == "own it":
        another = os.geteuid() + 1
        monkeypatch.setattr(cache.os, "geteuid", lambda: another)
        monkeypatch.setattr(cache, "_folder", lambda: planted)
    else:
        planted.rename(fresh / "elsewhere")
        planted.symlink_to(fresh / "elsewhere")
    before = sorted(planted.iterdir())
    assert not cache.is_kept("test")
    assert cache.find_library("test") is None
    assert cache.make_library("test", built).answer() == 42
    assert built.times == 1
    assert sorted(planted.iterdir()) == before
    assert sum("for this process only" in record.getMessage() for record in caplog.records) == 1


def test_a_cache_that_cannot_be_made_is_done_without(built, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REMOE_CACHE", str(tmp_path / "file"))
    assert cache.make_library("test", built).answer() == 42


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_whatever_the_umask_a_kept_library_is_found_again(built, fresh, umask):
    before = os.umask(umask)
    try:
        cache.make_library("test", built)
    finally:
        os.umask(before)
    assert cache.is_kept("test")
    assert {path.stat().st_mode & 0o777 for path in (cache._folder(), *cache._folder().iterdir())} == {0o700}


@pytest.mark.parametrize("given", [".", "some/where", "../beside"])
def test_a_relative_cache(built, tmp_path, monkeypatch, given):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("REMOE_CACHE", given)
    assert cache.make_library("test", built).answer() == 42
    assert cache.find_library("test").answer() == 42
    assert list((tmp_path / "work" / given).glob("*/test-*.so"))


def test_leftovers_of_a_killed_build_go(built, fresh):
    left = cache._folder() / "building-killed"
    left.mkdir(parents=True, mode=0o700)
    left.parent.chmod(0o700)
    (left / "steps.o").write_text("")
    cache.make_library("test", built)
    assert [path.suffix for path in cache._folder().iterdir()] == [".so"]


@pytest.mark.slow
def test_several_first_builds_at_once_make_one_library(built, fresh):
    code = f"""
import subprocess, sys
from remoe.experts.cpu import cache
def build(scratch):
    with open({str(fresh / "builds")!r}, "a") as log:
        log.write("built\\n")
    source = scratch / "answer.cpp"
    source.write_text('extern "C" int answer() {{ return 42; }}')
    subprocess.run(["sleep", "0.2"])
    subprocess.run([{kernels._compilers()[0]!r}, "-shared", "-fPIC", source, "-o", scratch / "a.so"], check=True)
    return scratch / "a.so"
assert cache.make_library("test", build).answer() == 42
"""
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert (fresh / "builds").read_text() == "built\n"
    assert len(list(fresh.glob("*/*"))) == 1


@pytest.mark.parametrize("trouble", ["exit 1", "[ $1 = --version ] && echo strange || exit 1"])
def test_a_failing_compiler_is_followed_by_the_next(fresh, monkeypatch, tmp_path, trouble):
    if (works := shutil.which("g++")) is None:
        pytest.skip("no g++ here")
    failing = tmp_path / "c++"
    failing.write_text(f"#!/bin/sh\n{trouble}\n")
    failing.chmod(0o755)
    tried = {"c++": str(failing), "g++": works}
    monkeypatch.setattr(kernels.shutil, "which", tried.get)
    monkeypatch.setattr(kernels, "_FLAGS", ("-O0", "-std=c++17", "-fPIC"))
    assert kernels.to_be_built()
    assert isinstance(kernels._library(), ctypes.CDLL)
    assert not kernels.to_be_built()
