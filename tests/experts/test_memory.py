"""Memory of the dense stage is bounded, and recomputing pre-activations changes nothing."""

import pytest
import torch

from remoe.experts import run_experts
from remoe.lab.bench.layer import Case, Output, Step, relu_layer, tokens
from remoe.lab.bench.timing import peak_bytes
from remoe.routing.assignment import Assignment

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["kernels", "bfloat16", "kernels of 32 threads", "no kernels", "steps only"])
@pytest.mark.parametrize(
    "case", [Case(1024, 128, 512, 8, 1), Case(1024, 128, 128, 32, 4), Case(1024, 128, 256, 32, 1)], ids=str
)
def test_dense_stage_needs_at_most_half_more_memory(case, variant, monkeypatch):
    if variant == "kernels of 32 threads":
        torch.set_num_threads(32)
    elif variant in ("no kernels", "steps only"):
        monkeypatch.setattr("remoe.experts.cpu.backend.compiled_passes", lambda dtype: None)
    if variant == "no kernels":
        monkeypatch.setattr("remoe.experts.cpu.backend.compiled_kernels", lambda dtype: None)
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    x, dy = (tokens(case.T, case.D, CPU, dtype) for _ in range(2))
    peaks = []
    for density in (case.k / case.E, 1):
        layer = Output(relu_layer(case, "cpu", density)).to(dtype)
        assert layer.layer(x)[1].count_E.sum() == pytest.approx(density * case.T * case.E, rel=0.1)
        step = Step(layer, x, dy)
        step()
        peaks.append(peak_bytes(step, CPU))
    assert peaks[1] <= 1.5 * peaks[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [0, 1, 40, 150])
def test_recomputed_pre_activations_change_nothing(stored, dtype):
    T, D, F, E = 63, 60, 36, 5
    active_TE = torch.rand(T, E) < 0.6
    leaves = [torch.randn(*shape).to(dtype) for shape in ((T, D), (E, 2 * F, D), (E, D, F))]
    leaves.append(torch.rand(T, E) * active_TE)
    results = []
    for limit in (None, stored):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        assignment = Assignment.from_gates(copies[3], active_TE)
        y = run_experts(*copies[:3], assignment, "cpu", stored=limit)
        y.square().sum().backward()
        results.append([y, *(copy.grad for copy in copies)])
    for whole, recomputed in zip(*results, strict=True):
        close = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(recomputed, whole, rtol=close, atol=close * whole.abs().max().item())
