"""Few tokens without gradients: the short way gives what the usual way gives, bit for bit, and stays out of the way."""

import pickle
from dataclasses import fields, replace

import pytest
import torch

import remoe.decoding as decoding
from remoe import MoE
from remoe.experts.cpu.build import compiled_kernels
from remoe.routing import ROUTERS, Routing
from remoe.routing.assignment import LateRouting

pytestmark = pytest.mark.skipif(compiled_kernels(torch.float32) is None, reason="no compiled kernels here")

KINDS = {
    "relu": ("relu", {}),
    "relu, scaled, with bias": ("relu", {"gate_scale": 2.0, "bias": True}),
    "relu, a cap of all": ("relu", {"max_experts_per_token": 6}),
    "relu_scaled": ("relu_scaled", {}),
    "topk": ("topk", {}),
    "topk, renormalised": ("topk", {"renormalize": True, "gate_scale": 3.0}),
    "sigmoid": ("sigmoid", {}),
    "threshold": ("threshold", {}),
}
every_kind = pytest.mark.parametrize(("router", "options"), KINDS.values(), ids=KINDS.keys())


def layer_of(router, options, **more):
    torch.manual_seed(0)
    layer = MoE(24, 20, 6, 2, router, init_std=0.3, router_options=options, **more)
    with torch.no_grad():
        for buffer in layer.router.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.4, 0.6)
    return layer.eval()


def usual(layer, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "MOST_TOKENS", -1)
        return layer(*args)


def assert_same(ours, usual):
    assert torch.equal(ours[0], usual[0])
    for field in fields(Routing):
        a, b = getattr(ours[1], field.name), getattr(usual[1], field.name)
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif b is None:
            assert a is None, field.name
    for name in ("token_N", "expert_N", "gate_N", "count_E"):
        assert torch.equal(getattr(ours[1].assignment, name), getattr(usual[1].assignment, name)), name


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_output_and_routing_are_those_of_the_usual_way(router, options, dtype):
    layer = layer_of(router, options, shared_expert_size=8).to(dtype)
    for x in (torch.randn(1, 24), torch.randn(4, 3, 24), torch.randn(0, 24)):
        x = x.to(dtype)
        got = layer(x)
        assert isinstance(got[1], LateRouting)
        assert_same(got, usual(layer, x))
        mask = torch.rand(x.shape[:-1]) < 0.6
        got, expected = layer(x, mask), usual(layer, x, mask)
        assert isinstance(got[1], LateRouting)
        assert torch.equal(got[0][mask], expected[0][mask])
        assert torch.equal(got[1].gate_TE, expected[1].gate_TE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_weights_in_8_and_4_bits_run_in_the_kernel(bits, dtype):
    torch.manual_seed(0)
    layer = MoE(64, 96, 6, 2, init_std=0.1).to(dtype).eval()
    if bits == 4:
        layer.experts.pack()
    else:
        quantization = pytest.importorskip("torchao.quantization")
        names, config = ("experts.gate_up_proj", "experts.down_proj"), quantization.Int8WeightOnlyConfig(version=2)
        quantization.quantize_(layer, quantization.FqnToConfig(dict.fromkeys(names, config)), filter_fn=None)
    for T in (1, 3, 12):
        x_TD = torch.randn(T, 64).to(dtype)
        y_TD, routing = layer(x_TD)
        assert isinstance(routing, LateRouting)
        expected_TD, _ = usual(layer, x_TD)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2  # hidden activations are rounded in the same places
        torch.testing.assert_close(y_TD, expected_TD, rtol=tolerance, atol=tolerance * expected_TD.abs().max().item())


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_gates_of_every_router_are_those_of_its_forward_pass_or_unknown(router):
    torch.manual_seed(0)
    made = MoE(24, 20, 6, 1 if router == "lory" else 2, router).router.eval()
    x = torch.randn(12, 24)
    gates = made.gates(x)
    if gates is not None:
        assert gates.dtype == torch.float32
        assert torch.equal(gates, made(x).gate_TE)
    assert (gates is None) == (router not in {kind for kind, _ in KINDS.values()})


@torch.no_grad()
def test_a_value_that_is_not_finite_stays_visible_with_its_token():
    layer = layer_of("relu", {})
    x = torch.randn(3, 24)
    x[1] = torch.nan
    y, routing = layer(x)
    assert isinstance(routing, LateRouting)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert routing.gate_TE[1].isnan().all()


@torch.no_grad()
def test_the_usual_way_is_taken_wherever_something_else_looks_or_takes_part():
    x = torch.randn(3, 24)

    def short(layer, x=x):
        return isinstance(layer(x)[1], LateRouting)

    layer = layer_of("relu", {})
    assert short(layer)
    assert not short(layer, torch.randn(decoding.MOST_TOKENS + 1, 24))
    assert not short(layer.double(), x.double())
    assert not short(layer_of("relu", {"max_experts_per_token": 2}))
    assert not short(layer_of("relu", {}, backend="naive"))
    layer = layer_of("relu", {})
    with torch.enable_grad():
        assert not short(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not short(layer)
    assert not short(layer.train())
    layer.eval()
    for module in (layer.router, layer.experts):
        handle = module.register_forward_hook(lambda *_: None)
        assert not short(layer)
        handle.remove()
        module.forward = module.forward
        assert not short(layer)
        del module.forward
    assert short(layer)


@torch.no_grad()
def test_a_routing_is_made_when_it_is_asked_for_whatever_has_happened_since(monkeypatch):
    layer = layer_of("topk", {})
    x, calls = torch.randn(3, 24), []
    monkeypatch.setattr(type(layer.router), "load", lambda *a: calls.append(1) or torch.ones(6))
    _, routing = layer(x)
    assert not calls
    layer.train()
    gate_TE, layer.router.weight = layer.router.gates(x), torch.nn.Parameter(torch.zeros_like(layer.router.weight))
    with torch.enable_grad():
        assert not routing.gate_TE.requires_grad
    assert torch.equal(routing.gate_TE, gate_TE)
    assert routing.sparsity.item() == pytest.approx(1 - 2 / 6)
    assert calls == [1]
    assert layer.router.training
    assert routing.pruned(0.0, 1).count_E.sum() == 3
    changed = replace(routing, num_tokens=torch.tensor(7))
    assert type(changed) is Routing
    assert changed.num_tokens == 7
    again = pickle.loads(pickle.dumps(routing))
    assert type(again) is Routing
    assert torch.equal(again.gate_TE, routing.gate_TE)


def test_an_inference_tensor_can_be_routed_later():
    layer = layer_of("relu", {})
    with torch.inference_mode():
        _, routing = layer(torch.randn(3, 24))
    assert routing.gate_TE.shape == (3, 6)


@torch.no_grad()
def test_a_compiled_layer_takes_the_usual_way_and_gives_the_same():
    layer, x = layer_of("relu", {}, shared_expert_size=8), torch.randn(3, 24)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, routing = compiled(x)
    assert not isinstance(routing, LateRouting)
    torch.testing.assert_close(y, layer(x)[0])
