"""The paper's figures (arXiv 2412.14711, section 4), and the plan against a model that really ran."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import remoe
from remoe import costs
from remoe.experts import STORED_RATIO
from remoe.experts.cpu.build import compiled_kernels
from remoe.lab.cli.plan import PlanOptions, _sizes
from remoe.lab.training.presets import PRESETS
from remoe.models.plan import parameters, plan, sizes_of, training_flops
from remoe.routing.lory import SEGMENT

# preset: dense parameters (M), parameters with E = 8 (M), GFLOPs per sequence
PAPER = {"182m": (182.5, 777, 995.4), "469m": (469.8, 2584, 2873.3), "978m": (978.4, 5735, 5991.5)}


def config(name, **options):
    return remoe.RemoeConfig(**PRESETS[name]["model"], vocab_size=PRESETS[name]["vocab_size"], **options)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_figures(name):
    dense_parameters, total_parameters, gflops = PAPER[name]
    dense, sparse = plan(config(name, router="dense"), 1024, 1), plan(config(name), 1024, 1)
    assert dense.total_parameters / 1e6 == pytest.approx(dense_parameters, abs=0.05)
    assert sparse.total_parameters / 1e6 == pytest.approx(total_parameters, abs=0.5)
    assert dense.flops_per_sequence / 1e9 == pytest.approx(gflops, abs=0.05)
    assert sparse.flops_per_sequence == dense.flops_per_sequence


def test_granularity_changes_neither_flops_nor_weights_but_the_router():
    coarse, fine = (plan(config("tiny", granularity=g), 256, 1) for g in (1, 4))
    assert fine.flops_per_sequence == coarse.flops_per_sequence
    assert fine.total_parameters - coarse.total_parameters == 4 * 128 * 8 * 3


def test_a_cap_changes_nothing_that_is_planned():
    assert plan(config("tiny", router_options={"max_experts_per_token": 2}), 256, 1) == plan(config("tiny"), 256, 1)


def test_flops_of_a_run_count_the_pairs_of_each_step():
    settings = config("tiny", shared_expert_size=64)
    tokens, S, D, L = 1000, 256, 128, 4
    fixed = L * (2 * D * 128 * 1.5 + 2 * S * 128 + 3 * D * 64 + D * 8) + D * 4096
    pair = L * 3 * D * 4 * D
    steps = [0.5, 0.875, 1.0]  # S: 4, 1 and 0 experts per token
    expected = 6 * tokens * (3 * fixed + pair * (4 + 1 + 0))
    assert training_flops(settings, S, tokens, steps) == pytest.approx(expected, rel=1e-9)
    wide = training_flops(config("tiny", router="dense_wide"), S, tokens, [0.0])
    dense = training_flops(config("tiny", router="dense"), S, tokens, [0.0])
    assert wide - dense == pytest.approx(6 * tokens * pair * 7, rel=1e-9)
    lory = training_flops(config("tiny", router="lory", router_options={"segment": 64}), S, tokens, [0.0])
    assert lory - dense == pytest.approx(6 * tokens * (pair * 8 / 64 + L * D * 8), rel=1e-9)
    ragged = training_flops(config("tiny", router="lory", router_options={"segment": 100}), S, tokens, [0.0])
    assert ragged - dense == pytest.approx(6 * tokens * (pair * 8 * 3 / S + L * D * 8), rel=1e-9)  # 100 + 100 + 56


def norm_kernels():
    return compiled_kernels(torch.float32) is not None


def stored_bytes(settings, ids):
    """What autograd saves in a training step, without the weights."""
    model = remoe.RemoeForCausalLM(settings).train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    stored = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            stored[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in stored.values())


@pytest.mark.parametrize("router", remoe.ROUTERS)
def test_every_router_is_planned_as_its_class_says(router):
    """The plan of `remoe plan`, which loads no class, against weights, FLOPs and memory of a model."""
    options = PlanOptions("tiny", granularity=1 if router == "lory" else 2, shared_expert_size=64)
    settings = config("tiny", router=router, granularity=options.granularity, shared_expert_size=64)
    quick, exact = _sizes(options, PRESETS["tiny"], router), sizes_of(settings)
    for place in ((0.125, 300), (0.6, 256)):
        assert quick.executed_experts(*place) == exact.executed_experts(*place)
    same = quick.executed_experts
    assert replace(quick, executed_experts=same) == replace(exact, executed_experts=same)
    assert parameters(settings)[0] == sum(p.numel() for p in remoe.RemoeForCausalLM(settings).parameters())
    ids = torch.randint(0, 4096, (2, 300))
    planned = plan(settings, 300, 2, norm_kernels=norm_kernels())
    # Not the same: some routers keep a few more numbers for each of the E logits, which weigh most in a small model.
    assert planned.dense_stage_activation_bytes == pytest.approx(stored_bytes(settings, ids), rel=0.05)


@pytest.mark.parametrize("kernels", [True, False])
def test_other_shapes_are_planned_too(kernels, monkeypatch):
    if not kernels:  # as on a GPU
        monkeypatch.setattr("remoe.models.kernels.compiled_kernels", lambda dtype: None)
    changes = {"qk_norm": True, "head_dim": 48, "attention_bias": True, "tie_word_embeddings": True}
    settings = config("tiny", router="dense", **changes)
    assert parameters(settings)[0] == sum(p.numel() for p in remoe.RemoeForCausalLM(settings).parameters())
    ids = torch.randint(0, 4096, (2, 30))
    planned = plan(settings, 30, 2, norm_kernels=kernels and norm_kernels())
    assert planned.activation_bytes == pytest.approx(stored_bytes(settings, ids), rel=1e-3)
    assert (costs.STORED_RATIO, costs.SEGMENT) == (STORED_RATIO, SEGMENT)


@pytest.mark.parametrize("router", ["topk", "dense"])
def test_flops_of_a_step_that_ran(router, monkeypatch):
    # The counter knows PyTorch's own products: no compiled experts, no fused loss, no products by oneDNN.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    settings = config("tiny", router=router, attn_implementation="eager", backend="naive")
    model = remoe.RemoeForCausalLM(settings).train()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False, return_logits=True).loss.backward()
    router_flops = 6 * 128 * 128 * 8 * 4 if router == "topk" else 0  # the formula leaves the router out
    planned = 2 * plan(settings, 64, 2).flops_per_sequence
    # Some versions of transformers make the rotary angles with a small matrix product.
    assert counter.get_total_flops() == pytest.approx(planned + router_flops, rel=1e-5)
