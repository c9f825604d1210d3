"""Experts are tested with threads that share the work, and by every path that a backend has."""

import functools

import pytest
import torch

from remoe.experts import run_experts
from remoe.experts.cpu.build import compiled_passes
from remoe.matmul import is_intel


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backend(request, monkeypatch):
    """A backend as a function; the parameter is its name, or that and "with the other product", "without passes" or
    "without kernels"."""
    name, _, variant = request.param.partition(" ")
    if variant == "with the other product":
        request.getfixturevalue("other_product")
    elif variant:
        monkeypatch.setattr(f"remoe.experts.{name}.backend.compiled_passes", lambda dtype: None)
    if variant == "without kernels":
        monkeypatch.setattr(f"remoe.experts.{name}.backend.compiled_kernels", lambda dtype: None)
    return functools.partial(run_experts, backend=name)


@pytest.fixture
def other_product(monkeypatch):
    """The matrix product that processors of other brands use."""
    if not torch.backends.mkl.is_available():
        pytest.skip("there is no other product than ours")
    monkeypatch.setenv("REMOE_PRODUCT", "own" if is_intel() else "mkl")
    compiled_passes.cache_clear()
    yield
    monkeypatch.undo()
    compiled_passes.cache_clear()
    compiled_passes(torch.float32)  # which gives the library its product again
