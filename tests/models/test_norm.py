"""RMSNorm by kernels against LlamaRMSNorm's formula."""

import pytest
import reference
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from remoe.experts.cpu.build import compiled_kernels
from remoe.models.norm import RMSNorm, residual_norm

KERNELS = pytest.mark.skipif(compiled_kernels(torch.float32) is None, reason="no compiled kernels here")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def norms(D: int, dtype: torch.dtype = torch.float32) -> tuple[RMSNorm, LlamaRMSNorm]:
    ours, theirs = RMSNorm(D, 1e-5).to(dtype), LlamaRMSNorm(D, 1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.uniform_(-1, 1))
    return ours, theirs


def results(norm: LlamaRMSNorm, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = norm(x)
    return [y, *torch.autograd.grad(y, (x, norm.weight), dy)]


@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (2, 1, 768), (3, 65, 48)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_and_gradients_are_the_formulas(shape, dtype):
    x, dy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    ours, theirs = norms(shape[-1], dtype)
    got = results(ours, x, dy)
    for mine, other in zip(got, results(theirs, x, dy), strict=True):
        assert mine.dtype is other.dtype
        assert mine.shape == other.shape
        assert mine.numel() == 0 or reference.relative_error(mine, other) < TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(ours(x), got[0])


def results_of_sum(norm: LlamaRMSNorm, x: Tensor, added: Tensor | None, ds: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [x, norm.weight] if added is None else [x, added, norm.weight]
    s, y = residual_norm(norm, x, added)
    return [s, y, *torch.autograd.grad((s, y), leaves, (ds, dy))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alone", [True, False], ids=["x", "x + added"])
def test_norm_beside_a_residual_connection(alone, dtype):
    x, added = (torch.randn(3, 65, 48).to(dtype).requires_grad_() for _ in range(2))
    ds, dy = torch.randn(3, 65, 48).to(dtype), torch.randn(65, 48, 3).to(dtype).permute(2, 0, 1)
    ours, theirs = norms(48, dtype)  # the second is not ours and takes the formula
    got, expected = (results_of_sum(norm, x, None if alone else added, ds, dy) for norm in (ours, theirs))
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype is other.dtype
        assert reference.relative_error(mine, other) < TOLERANCE[dtype]
    with torch.no_grad():
        assert all(map(torch.equal, residual_norm(ours, x, None if alone else added), got[:2]))
    s, _ = residual_norm(ours, x, added)  # of which the norm is not used
    assert torch.equal(*torch.autograd.grad(s, (x, added), ds))


def test_a_hook_on_a_norm_beside_a_residual_connection_is_called():
    ours, _ = norms(8)
    ours.register_forward_hook(lambda module, inputs, y: y * 2)
    s, y = residual_norm(ours, torch.ones(2, 8), torch.ones(2, 8))
    torch.testing.assert_close(y, 2 * ours.forward(s))


def test_transposed_tokens_and_other_dtypes():
    ours, theirs = norms(6)
    x_DT = torch.randn(6, 4, requires_grad=True)
    dy_TD = torch.randn(6, 4).t()
    for mine, other in zip(results(ours, x_DT.t(), dy_TD), results(theirs, x_DT.t(), dy_TD), strict=True):
        torch.testing.assert_close(mine, other)
    assert torch.equal(ours(x_DT.t().bfloat16()), theirs(x_DT.t().bfloat16()))


def test_gradients_of_gradients():
    x = torch.randn(4, 6, requires_grad=True)
    for mine, other in zip(*(second_gradients(norm, x) for norm in norms(6)), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.any()


def second_gradients(norm: LlamaRMSNorm, x: Tensor) -> tuple[Tensor, ...]:
    s, y = residual_norm(norm, x, x.sin())
    (dx,) = torch.autograd.grad((norm(x).pow(3) + s.pow(3) * y.pow(2)).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), (x, norm.weight))


@KERNELS
def test_results_do_not_depend_on_the_number_of_threads():
    (norm, _), x, dy = norms(192), torch.randn(500, 192, requires_grad=True), torch.randn(500, 192)
    threads, several = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            several.append(results(norm, x, dy))
    finally:
        torch.set_num_threads(threads)
    for other in several[1:]:
        assert all(torch.equal(a, b) for a, b in zip(several[0], other, strict=True))


def test_nan_stays_visible():
    x = torch.ones(3, 8)
    x[1, 2] = torch.nan
    y = norms(8)[0](x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_who_follows_operators_sees_the_formula():
    norm, x, other = norms(8)[0], torch.randn(4, 8), torch.randn(4, 8)
    traced = torch.jit.trace(norm, (x,))
    torch.testing.assert_close(traced(other), norm(other))
    graph = torch.fx.experimental.proxy_tensor.make_fx(norm)(x)
    torch.testing.assert_close(graph(other), norm(other))
    (dx,) = torch.autograd.grad(norm(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: norm(x).sum())(x), dx)
    with FakeTensorMode() as mode:
        assert RMSNorm(8)(mode.from_tensor(x)).shape == (4, 8)
    assert norm.to("meta")(x.to("meta")).shape == (4, 8)
