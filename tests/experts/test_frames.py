"""How far it is from the layer to the kernel: at most five functions in three files of this package."""

import sys
from pathlib import Path

import pytest
import torch

import remoe
from remoe.experts import resolve_backend
from remoe.experts.cpu import backend as cpu

PACKAGE = str(Path(remoe.__file__).parent)
FRAMES, FILES = 5, 3


def way_here():
    """The functions of this package that are running, the layer's last, as (file, name)."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found


def check(ways):
    assert ways
    for way in ways:
        assert way[-1] == (remoe.MoE.forward.__code__.co_filename, "forward")
        assert len(way) <= FRAMES, way
        assert len({file for file, _ in way}) <= FILES, way


def watch(monkeypatch, owner, name):
    """Ways to the function `name`, which goes on working."""
    ways, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **named: ways.append(way_here()) or function(*args, **named))
    return ways


@pytest.fixture
def layer():
    return remoe.MoE(32, 48, 4, 2, backend="cpu", init_std=0.5)


def test_to_the_compiled_passes(layer, monkeypatch):
    if (passes := cpu.compiled_passes(torch.float32)) is None:
        pytest.skip("no compiler here")
    ways = watch(monkeypatch, passes, "experts_forward")
    layer(torch.randn(64, 32))
    check(ways)


def test_to_the_kernel_for_a_few_tokens(layer, monkeypatch):
    if (kernels := cpu.compiled_kernels(torch.float32)) is None:
        pytest.skip("no compiler here")
    ways = watch(monkeypatch, kernels, "few_tokens")
    with torch.no_grad():
        layer(torch.randn(1, 32))
    check(ways)


def test_to_the_products_of_the_fallback(layer, monkeypatch):
    monkeypatch.setattr(cpu, "compiled_passes", lambda dtype: None)
    monkeypatch.setattr(cpu, "compiled_kernels", lambda dtype: None)
    ways = watch(monkeypatch, torch, "mm")
    layer(torch.randn(64, 32))
    check([way for way in ways if way[0][0] == cpu.__file__])


def test_to_the_products_of_grouped(monkeypatch):
    resolve_backend("grouped", "cpu", torch.float32, 32, 48)
    ways = watch(monkeypatch, torch.nn.functional, "grouped_mm")
    remoe.MoE(32, 48, 4, 2, backend="grouped", init_std=0.5)(torch.randn(64, 32))
    check(ways)


def test_to_a_launch_of_triton(monkeypatch):
    pytest.importorskip("triton")
    from remoe.experts.triton import backend, kernels, launch

    ways = []

    class Recorded:
        """Stands for a kernel, whose launch it records and does not make."""

        def __getitem__(self, grid):
            return lambda *args, **named: ways.append(way_here())

    for name in ("up_projection", "project", "combine"):
        monkeypatch.setattr(kernels, name, Recorded())
    monkeypatch.setattr("remoe.experts.triton.plan.plan_windows", Recorded())
    monkeypatch.setattr("remoe.experts.triton.plan.place_pairs", Recorded())
    monkeypatch.setattr(backend, "device_tiles", lambda *_: (launch.TILES["small"], 132))
    monkeypatch.setattr("remoe.experts.module.resolve_backend", lambda *_: "triton")  # without a GPU
    remoe.MoE(32, 48, 4, 2, backend="triton", init_std=0.5)(torch.randn(64, 32))
    assert len(ways) == 5
    check(ways)
