"""Products by whichever library: the same figures, gradients, and modules."""

import pytest
import reference
import torch
from torch import nn

from remoe import matmul as gemm


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    """Both ways on any machine: oneDNN runs everywhere, it only does not pay everywhere."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(gemm, "_onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(gemm, "LEAST_WORK", 1)
    return request.param


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(63, 60, 36), (1, 1, 1), (5, 200, 3)], ids=str)
def test_products_of_transposed_and_plain_operands(shape):
    M, K, N = shape
    for a, b in (
        (torch.randn(M, K), torch.randn(K, N)),
        (torch.randn(K, M).t(), torch.randn(K, N)),
        (torch.randn(M, K), torch.randn(N, K).t()),
        (torch.randn(K, M).t(), torch.randn(N, K).t()),
        (torch.randn(M + 2, K)[1:-1], torch.randn(K, N + 3)[:, 2:-1]),
    ):
        assert reference.relative_error(gemm.product(a, b), a.double() @ b.double()) < 1e-5


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(63, 60), (3, 7, 60), (60,), (0, 60)], ids=str)
def test_linear_is_nn_linear(shape):
    ours, theirs = gemm.Linear(60, 36, bias=False), nn.Linear(60, 36, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape).requires_grad_()
    exact = x.detach().double().requires_grad_()
    dy = torch.randn(*shape[:-1], 36)
    y, expected = ours(x), theirs(exact)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.shape == expected.shape
    for a, b in ((y, expected), (x.grad, exact.grad), (ours.weight.grad, theirs.weight.grad)):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(63, 60), (3, 7, 60), (0, 60)], ids=str)
def test_joined_products_are_those_of_each_weight(shape):
    x = torch.randn(shape).requires_grad_()
    weights = [torch.randn(rows, 60).requires_grad_() for rows in (36, 4, 1)]
    together, apart = gemm.joined_linear(x, *weights), torch.cat([x @ weight.t() for weight in weights], dim=-1)
    dy = torch.randn_like(apart)
    for a, b in zip(*(gradients_twice(y, [x, *weights], dy) for y in (together, apart)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def gradients_twice(y: torch.Tensor, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """The output, its gradients, and with create_graph those of the gradient of x."""
    plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, inputs[0], dy * y.detach().tanh(), create_graph=True)
    return [y, *plain, dx, *torch.autograd.grad(dx.pow(2).sum(), inputs[1:])]


@pytest.mark.usefixtures("library")
def test_gradients_that_are_not_wanted_are_not_computed():
    layer = gemm.Linear(6, 4, bias=False)
    layer(torch.randn(5, 6)).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 6).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("library")
def test_other_dtypes_bias_and_autocast_are_left_to_pytorch():
    x = torch.randn(5, 6)
    assert gemm.Linear(6, 4, bias=False).double()(x.double()).dtype == torch.float64
    assert gemm.Linear(6, 4, bias=False).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with_bias = gemm.Linear(6, 4)
    torch.testing.assert_close(with_bias(x), x @ with_bias.weight.t() + with_bias.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gemm.Linear(6, 4, bias=False)(x).dtype == torch.bfloat16


def test_switched_off_with_onednn(monkeypatch):
    monkeypatch.setattr(gemm, "_onednn_is_faster", lambda: True)
    x = torch.empty(4096, 1024)
    assert gemm.prefers_onednn(x, 1024)
    assert not gemm.prefers_onednn(x[:1], 1024)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not gemm.prefers_onednn(x, 1024)
