"""Building the compiled kernels, and doing without them."""

import logging
from pathlib import Path

import pytest
import reference
import torch

from remoe.experts import run_experts
from remoe.experts.cpu import build as kernels
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


def output():
    torch.manual_seed(0)
    active = torch.rand(9, 3) < 0.5
    assignment = Assignment.from_gates(torch.rand(9, 3), active)
    return run_experts(torch.randn(9, 6), torch.randn(3, 8, 6), torch.randn(3, 6, 4), assignment, "cpu")


@pytest.mark.slow
def test_built_once_and_found_again(fresh):
    if kernels.compiled_kernels(torch.float32) is None:
        pytest.skip("no compiler here")
    (library,) = fresh.iterdir()
    before = library.stat().st_mtime_ns
    for function in (kernels._library, kernels.compiled_kernels):
        function.cache_clear()
    assert kernels.compiled_kernels(torch.bfloat16) is not None
    assert library.stat().st_mtime_ns == before


def test_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("REMOE_KERNELS", "0")
    assert kernels.compiled_kernels(torch.float32) is None
    assert kernels.compiled_passes(torch.float32) is None
    assert not list(fresh.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["none", "fails"])
def test_without_a_working_compiler_the_result_is_the_same(fresh, monkeypatch, tmp_path, caplog, trouble):
    expected = output()
    for function in (kernels._library, kernels.compiled_kernels, kernels.compiled_passes):
        function.cache_clear()
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such processor >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: str(compiler) if trouble == "fails" else None)
    with caplog.at_level(logging.INFO, logger="remoe.experts.cpu.build"):
        assert reference.relative_error(output(), expected) < 1e-5
    words = "no such processor" if trouble == "fails" else "no C++ compiler"
    assert sum(words in record.getMessage() for record in caplog.records) == 1


@pytest.mark.slow
def test_whether_kernels_will_be_compiled_is_known_before(fresh, monkeypatch):
    if kernels._compiler() is None:
        assert not kernels.to_be_built()
        pytest.skip("no compiler here")
    assert kernels.to_be_built()
    assert kernels.compiled_kernels(torch.float32) is not None
    assert not kernels.to_be_built()
    monkeypatch.setenv("REMOE_KERNELS", "0")
    assert not kernels.to_be_built()


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
