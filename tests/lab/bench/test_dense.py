"""Every dense layer that a mixture is compared with computes the same, forward and backward."""

import pytest
import torch

from remoe.lab.bench.dense import DenseLayer, OneDnnLayer, dense_layers
from remoe.lab.bench.roofline import Roofline, describe
from remoe.lab.bench.timing import comparison


@pytest.mark.parametrize("tokens", [1, 63])
def test_the_layer_by_onednn_equals_that_of_nn_linear(tokens):
    torch.manual_seed(0)
    layers = DenseLayer(20, 36), OneDnnLayer(20, 36)
    layers[1].load_state_dict(layers[0].state_dict())
    x, dy = torch.randn(tokens, 20), torch.randn(tokens, 20)
    found = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append((y.detach(), leaf.grad, *(weight.grad for weight in layer.parameters())))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_which_dense_layers_there_are():
    assert list(dense_layers(4, 8, torch.float32, compiled=False)) == ["dense", "dense oneDNN"]
    assert list(dense_layers(4, 8, torch.bfloat16, compiled=True)) == ["dense", "dense compiled"]


def test_the_fastest_dense_layer_is_the_yardstick():
    seconds = {"dense": [4.0, 4.0, 4.0], "dense oneDNN": [1.0, 2.0, 3.0], "remoe relu": [3.0, 3.0, 9.0]}
    found = comparison(seconds, ("dense", "dense oneDNN"))
    assert found["fastest_dense"] == "dense oneDNN"
    assert found["ratio_to_fastest_dense"] == {"dense": 2, "dense oneDNN": 1, "remoe relu": 1.5}
    assert found["ratio_to_dense"]["remoe relu"] == 0.75
    assert found["spread"] == {"dense": 0, "dense oneDNN": 0.5, "remoe relu": 1}


def test_the_line_beside_a_table_names_libraries_and_their_rates():
    facts = {"cpu": "EPYC", "brand": "AuthenticAMD", "vectors": "AVX512", "threads": 2, "torch": "2.13.0"}
    facts |= {"date": "2026-01-02", "mkl": "2024.2", "onednn": "3.7.1"}
    assert describe(facts, Roofline(4e11, 2e11, 2e10, 4e11), "float32") == (
        "EPYC (AuthenticAMD, AVX512), 2 threads, torch 2.13.0, float32, 2026-01-02: "
        "MKL 2024.2 200 GFLOP/s, oneDNN 3.7.1 400 GFLOP/s, memory reads 20.0 GB/s"
    )
