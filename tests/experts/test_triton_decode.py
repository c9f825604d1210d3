"""A layer on few tokens by two Triton kernels, in Triton's interpreter: against the usual way, in models and graphs.

`test_triton_in_its_interpreter` of test_backends.py starts these tests in a process with the interpreter.
"""

import functools
import os

import pytest
import torch

import remoe.decoding as decoding
from remoe import MoE, RemoeConfig, RemoeForCausalLM
from remoe.routing.assignment import LateRouting

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

KINDS = {
    "relu": ("relu", {"gate_scale": 2.0, "bias": True}),
    "topk": ("topk", {"renormalize": True, "gate_scale": 3.0}),
    "sigmoid": ("sigmoid", {}),
    "threshold": ("threshold", {}),
}


def layer_of(router="relu", options=None, **more):
    torch.manual_seed(0)
    layer = MoE(20, 18, 5, 2, router, init_std=0.3, router_options=options, backend="triton", **more).eval()
    for buffer in layer.router.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.4, 0.6)
    return layer


def usual(layer, *args, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "MOST_TOKENS", -1)
        return layer(*args, **more)


@pytest.fixture
def launches(monkeypatch):
    """The names of all launched kernels of the package."""
    from triton.runtime.interpreter import GridExecutor

    names, call = [], GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: names.append(self.fn.__name__) or call(self, *a, **k)
    )
    return names


@pytest.mark.parametrize(("router", "options"), KINDS.values(), ids=KINDS.keys())
@torch.no_grad()
def test_triton_decodes_a_layer_in_two_launches(router, options, launches):
    layer = layer_of(router, options, shared_expert_size=8)
    x, mask = torch.randn(3, 20), torch.tensor([True, False, True])
    y, routing = layer(x, mask)
    assert launches == ["gates_and_hidden", "down_and_sum"]
    assert isinstance(routing, LateRouting)
    expected, expected_routing = usual(layer, x, mask)
    torch.testing.assert_close(y[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert torch.equal(routing.gate_TE, expected_routing.gate_TE)


@torch.no_grad()
def test_triton_decodes_16_bits_from_gates_with_a_cap_and_repeats():
    layer = layer_of(options={"bias": True}).half()
    layer.max_experts, x = 1, torch.randn(17, 20).half()
    y, routing = layer(x)
    assert routing.count_E.sum() <= 17
    torch.testing.assert_close(y, usual(layer, x)[0], rtol=1e-2, atol=1e-2)
    assert torch.equal(layer(x)[0], y)


@torch.no_grad()
def test_triton_keeps_what_is_not_finite_with_its_token():
    for router in ("relu", "topk"):
        layer, x = layer_of(router), torch.randn(2, 20)
        x[1] = torch.nan
        y, _ = layer(x)
        assert y[1].isnan().all()
        assert y[0].isfinite().all()


@torch.no_grad()
def test_triton_decodes_in_a_graph():
    layer, x = layer_of(shared_expert_size=8), torch.randn(3, 20)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    y, routing = compiled(x)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert "remoe.decode_triton.default" in targets
    assert not any("experts_forward" in target for target in targets)
    expected, expected_routing = layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(routing.gate_TE, expected_routing.gate_TE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_triton_writes_the_text_of_the_cpu_with_a_cache_of_this_kind(cache, launches):
    texts = []
    for backend in ("triton", "cpu"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = RemoeConfig(vocab_size=40, num_experts=4, initializer_range=0.3, backend=backend, **sizes)
        model = RemoeForCausalLM(config).eval()
        prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        texts.append(model.generate(prompt, cache_implementation=cache, **options))
    assert torch.equal(*texts)
    assert launches == ["gates_and_hidden", "down_and_sum"] * 3


@torch.no_grad()
def test_triton_decodes_by_the_gates_of_a_relufied_model(monkeypatch, launches):
    monkeypatch.setattr(decoding, "takes_few_tokens", lambda *_: False)
    monkeypatch.setattr(decoding, "takes_triton", functools.partial(decoding.takes_triton, backend="triton"))
    layer, x = layer_of(), torch.randn(3, 20)
    weights = layer.experts.gate_up_proj, layer.experts.down_proj
    y = decoding.decode_by_gates(x, layer.router.gates(x), *weights)
    assert launches == ["gates_and_hidden", "down_and_sum"]
    torch.testing.assert_close(y, usual(layer, x)[0], rtol=1e-5, atol=1e-5)
    assert decoding.decode_by_gates(torch.randn(65, 20), torch.rand(65, 5), *weights) is None
