"""Whole models on a GPU: a training step that never waits, generation with every cache, layers in a CUDA graph."""

import pytest
import torch
from experts.cases import no_waiting, problem

import remoe
from remoe.experts import run_experts
from remoe.lab.training.config import OptimOptions
from remoe.lab.training.optimizer import build_optimizer
from remoe.routing.assignment import Assignment, LateRouting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts": 8,
}  # fmt: skip


def build(**options):
    torch.manual_seed(0)
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, **options)).to("cuda")


@pytest.mark.parametrize("router", ["relu", "topk", "expert_choice", "threshold", "sigmoid"])
def test_a_training_step_never_waits_for_the_device(router):
    model = build(router=router, backend="triton").train()
    optimizer = build_optimizer(model, OptimOptions())
    ids = torch.randint(512, (4, 129), device="cuda")

    def step():
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs = model(ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), num_items_in_batch=512, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model.update_routing()
        optimizer.step()

    step()  # compiles
    with no_waiting():
        step()


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_generation_of_a_left_padded_batch_is_the_same_with_every_cache(place):
    """transformers compiles decoding with a static cache by itself here, and moves what lies on the host."""
    model = build(router="relu").eval()
    ids = torch.randint(1, 512, (2, 9)).to(place)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    dynamic = model.generate(ids * mask, **given)
    assert torch.equal(model.generate(ids * mask, cache_implementation="static", **given), dynamic)


@pytest.mark.parametrize("T", [1, 33, 64])
@pytest.mark.parametrize("router", ["relu", "relu_scaled", "topk", "sigmoid", "threshold", "relu_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_tokens_without_lists_give_what_lists_give(router, T, dtype, monkeypatch):
    layer = remoe.MoE(272, 200, 12, 3, router, shared_expert_size=72).to("cuda", dtype).eval()
    x, mask = torch.randn(T, 272, dtype=dtype, device="cuda"), torch.rand(T, device="cuda") < 0.8
    mask[0] = True
    with torch.no_grad():
        y, routing = layer(x, mask)  # compiles
        with no_waiting():
            again, _ = layer(x, mask)
    assert isinstance(routing, LateRouting)
    assert torch.equal(y[mask], again[mask])
    monkeypatch.setattr("remoe.decoding.MOST_TOKENS", -1)
    with torch.no_grad():
        expected, _ = layer(x, mask)
    error = (y[mask] - expected[mask]).float().norm() / expected[mask].float().norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("T", [64, 128], ids=["without lists", "with lists"])
@pytest.mark.parametrize("router", ["relu", "topk", "expert_choice", "threshold"])
def test_a_layer_in_a_cuda_graph(router, T):
    layer = remoe.MoE(256, 384, 8, 2, router, backend="triton").to("cuda", torch.bfloat16).eval()
    x = torch.randn(T, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        expected, _ = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(x)
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["triton", "grouped"])
def test_frozen_experts_pass_on_the_same_gradients(backend):
    (x, gate_up, down, gate_TE), active = problem(777, 256, 192, 6, 0.5, torch.bfloat16, device="cuda")
    found = []
    for frozen in (False, True):
        for weight in (gate_up, down):
            weight.requires_grad_(not frozen)
        y = run_experts(x, gate_up, down, Assignment.from_gates(gate_TE, active), backend)
        found.append(torch.autograd.grad(y, (x, gate_TE), torch.ones_like(y)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
