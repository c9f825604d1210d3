"""The Triton kernels compile for the GPUs that the table of tiles is for, and fit into their memory; no GPU is needed.

The launches of a forward and a backward pass are recorded, and each kernel is compiled with their arguments.
"""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.tools.tensor_descriptor import TensorDescriptor

from remoe.experts.contract import Problem
from remoe.experts.triton import backend, decode_kernels, launch
from remoe.experts.triton import decode as decoding
from remoe.experts.triton import kernels as triton_kernels
from remoe.experts.triton import plan as triton_plan

pytestmark = pytest.mark.slow

SHARED = {"large": 227, "large, few": 227, "small": 99, "float32": 99}  # KiB that one program may take
CAPABILITY = {"large": 90, "large, few": 90, "small": 80, "float32": 80}
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"}
MODULES = (triton_kernels, triton_plan, decode_kernels)
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands for the kernels' modules and remembers launches instead of making them."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        return RecordedKernel(name, self.launches)


class RecordedKernel:
    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((self.name, args, named))


def launches(tiles, T, D, F, E, monkeypatch):
    dtype = torch.float32 if tiles == "float32" else torch.bfloat16
    x_TD, gate_up_E2FD, down_EDF = torch.zeros(T, D), torch.zeros(E, 2 * F, D), torch.zeros(E, D, F)
    x_TD, gate_up_E2FD, down_EDF = (t.to(dtype) for t in (x_TD, gate_up_E2FD, down_EDF))
    token_N, gate_N = torch.arange(T).repeat(E), torch.zeros(E * T)
    count_E, pre_C2F = torch.full((E,), T), x_TD.new_zeros(T, 2 * F)
    monkeypatch.setattr(backend, "device_tiles", lambda *_: (launch.TILES[tiles], 132))
    recorder = Recorder()
    for module in ("kernels", "plan"):
        monkeypatch.setattr(f"remoe.experts.triton.{module}", recorder)
    monkeypatch.setattr("remoe.experts.windows.MIN_WINDOW", T)  # the second window is computed again
    problem = Problem(x_TD, gate_up_E2FD, down_EDF, gate_N, token_N, count_E, None)
    backend.forward(T, *problem)
    backend.backward(True, x_TD, pre_C2F, *problem)
    return recorder.launches


def compiled(name, args, named, capability):
    kernel = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k not in OPTIONS}
    assert set(values) == set(names), name
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature, aligned = {}, {}
    for place, argument in enumerate(names):
        value = values[argument]
        if argument in constants:
            signature[argument] = "constexpr"
        elif isinstance(value, TensorDescriptor):
            signature[argument] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[argument] = TYPES[value.dtype]
            aligned[place,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
    options = {option: named[option] for option in OPTIONS if option in named}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted here")
@pytest.mark.parametrize(
    ("tiles", "T", "F"),
    [("large", 256, 704), ("large", 256, 700), ("large, few", 16, 712), ("small", 256, 712), ("float32", 256, 712)],
)
def test_every_kernel_compiles_and_fits(tiles, T, F, monkeypatch):
    seen = {}
    for name, args, named in launches(tiles, T, 576, F, 3, monkeypatch):
        if name == "weight_gradient":
            assert named["DESCRIBED"] == (tiles == "large" and F == 704)
        key = (name, *sorted((k, v) for k, v in named.items()), *(a.dtype for a in args if torch.is_tensor(a)))
        if key not in seen:
            seen[key] = compiled(name, args, named, CAPABILITY[tiles])
    assert len({key[0] for key in seen}) == 8  # all there are
    for (name, *_), binary in seen.items():
        assert binary.metadata.shared <= SHARED[tiles] * 1024, name
        assert "cubin" in binary.asm, name


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted here")
def test_both_kernels_for_few_tokens_compile_and_fit(monkeypatch):
    recorder, T, E, D, F = Recorder(), 33, 8, 576, 328
    monkeypatch.setattr("remoe.experts.triton.decode_kernels", recorder)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    x, router, gate_up, down = (torch.zeros(*s).bfloat16() for s in ((T, D), (E, D), (E, 2 * F, D), (E, D, F)))
    shared = gate_up[:1].clone(), down[:1].clone()
    rule = ("sigmoid", router, None, torch.zeros(E), 3, 2.0, True)
    decoding._decode(x, torch.ones(T, dtype=torch.bool), None, *rule, gate_up, down, *shared)
    assert [name for name, *_ in recorder.launches] == ["gates_and_hidden", "down_and_sum"]
    for name, args, named in recorder.launches:
        binary = compiled(name, args, named, CAPABILITY["small"])
        assert binary.metadata.shared <= SHARED["small"] * 1024, name
