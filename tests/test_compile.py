"""torch.compile and torch.export of our layers: one graph, the same numbers."""

import pytest
import reference
import torch
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounterWithBackend

import remoe
from remoe.routing import ROUTERS


def tiny_model(router):
    config = remoe.RemoeConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=4, router=router
    )
    return remoe.RemoeForCausalLM(config)


def losses_and_gradients(model, call, token_BS):
    model.zero_grad()
    torch.manual_seed(0)  # of sparsemixer's draws
    out = call(token_BS, labels=token_BS, use_cache=False)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "router",
    ["relu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("topk", "dense", "sparsemixer", "lory"))],
)
def test_model_compiles_into_one_graph(router):
    torch.compiler.reset()
    model = tiny_model(router).train()
    token_BS = torch.randint(0, 128, (2, 17))
    eager = losses_and_gradients(model, model, token_BS)
    model.sparsity.update()
    seen = model.sparsity.load_LE.clone()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, losses_and_gradients(model, compiled, token_BS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    model.sparsity.update()
    assert torch.equal(model.sparsity.load_LE, seen)


@pytest.mark.slow
def test_the_load_of_a_step_so_far_compiles_once():
    torch.compiler.reset()
    model = tiny_model("relu").train()
    for router in model.sparsity.routers:
        router.global_load = True
    counter = CompileCounterWithBackend("eager")
    batches = torch.randint(0, 128, (3, 3, 2, 17))  # steps of three micro-batches

    def course(call):
        values = []
        for step_MBS in batches:
            for token_BS in step_MBS:
                out = call(token_BS, labels=token_BS, use_cache=False)
                values += [out.reg_loss.detach(), *torch.autograd.grad(out.reg_loss, model.sparsity.routers[0].weight)]
                model.sparsity.carry_load(out.routings)
            model.sparsity.discard_statistics()
        return values

    for a, b in zip(course(model), course(torch.compile(model, fullgraph=True, backend=counter)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2  # the first micro-batch of a step, and all others


@pytest.mark.slow
def test_layer_compiles_with_inductor():
    torch.compiler.reset()
    layer = remoe.MoE(60, 36, 5, 2, init_std=0.3)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (33, 12, 7):  # the second size makes shapes dynamic, the third uses them
        x = torch.randn(tokens, 60)
        y, routing = layer(x)
        y_compiled, routing_compiled = compiled(x)
        torch.testing.assert_close(y_compiled, y)
        assert torch.equal(routing_compiled.count_E, routing.count_E)


def test_layer_compiles_under_autocast_and_recomputation():
    torch.compiler.reset()
    layer = remoe.MoE(60, 36, 5, 2, init_std=0.3)
    x = torch.randn(33, 60, requires_grad=True)

    def run(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(lambda x: call(x)[0], x, use_reentrant=False)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    for a, b in zip(run(layer), run(torch.compile(layer, fullgraph=True, backend="aot_eager")), strict=True):
        assert reference.relative_error(b, a) < 1e-2  # the graph rounds to bfloat16 at other places


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ["relu", "lory"])
def test_a_model_is_exported_as_it_is_saved_and_loaded(router, training, tmp_path):
    model, token_BS = tiny_model(router).train(training), torch.randint(0, 128, (2, 9))
    exported = torch.export.export(model, (token_BS,), {"use_cache": False})
    torch.export.save(exported, tmp_path / "model.pt2")
    for program in (exported, torch.export.load(tmp_path / "model.pt2")):
        found = program.module()(token_BS, use_cache=False)
        expected = model(token_BS, use_cache=False)
        torch.testing.assert_close(found.logits, expected.logits)
        assert found.keys() == expected.keys()
        if training:
            for ours, theirs in zip(found.routings, expected.routings, strict=True):
                torch.testing.assert_close(ours.gate_TE, theirs.gate_TE)


@pytest.mark.slow
def test_a_step_with_a_static_cache_is_one_graph():
    from transformers import StaticCache

    assert remoe.RemoeForCausalLM._can_compile_fullgraph
    torch.compiler.reset()
    model, token_BS = tiny_model("relu").eval().requires_grad_(False), torch.randint(0, 128, (2, 9))
    cache = StaticCache(config=model.config, max_cache_len=12)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    for end, begin in ((7, 0), (8, 7)):
        mask_BS = torch.ones(2, end, dtype=torch.int64)
        position_BS = torch.arange(begin, end).expand(2, -1)
        given = {"past_key_values": cache, "attention_mask": mask_BS, "position_ids": position_BS}
        found = step(token_BS[:, begin:end], **given).logits[:, -1]
        torch.testing.assert_close(found, model(token_BS[:, :end]).logits[:, -1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", ["relu", *(pytest.param(r, marks=pytest.mark.slow) for r in ROUTERS if r != "relu")])
def test_exported_model_takes_other_batch_sizes(router):
    model, token_BS = tiny_model(router).eval(), torch.randint(0, 128, (5, 17))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        for more in ({}, {"labels": token_BS})[: 1 + (router == "relu")]:
            few = {name: ids[:2] for name, ids in more.items()}
            shapes = {"input_ids": batch, "use_cache": None} | dict.fromkeys(more, batch)
            exported = torch.export.export(model, (token_BS[:2],), {"use_cache": False} | few, dynamic_shapes=shapes)
            found = exported.module()(token_BS, use_cache=False, **more)
            expected = model(token_BS, use_cache=False, **more)
            torch.testing.assert_close(dict(found), dict(expected))
            assert set(found) == {"logits"} | ({"loss", "lm_loss"} if more else set())


@pytest.mark.parametrize("tokens", [6, 33])
def test_layer_exports_with_gradients_and_any_number_of_tokens(tokens):
    layer = remoe.MoE(16, 32, 4, 2)
    shapes = ({0: torch.export.Dim("tokens", min=2)},)
    exported = torch.export.export(layer, (torch.randn(tokens, 16),), dynamic_shapes=shapes).module()
    for T in (2, 5, 12, 64):
        x = torch.randn(T, 16)
        (y, routing), (expected, expected_routing) = exported(x), layer(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(routing.gate_TE, expected_routing.gate_TE)


def test_operators_follow_their_contract():
    from remoe.experts.dispatch import OPERATORS, TRACED

    T, D, F, E = 9, 6, 4, 3
    count_E = torch.tensor([2, 0, 3])
    token_N = torch.tensor([0, 5, 1, 5, 8])
    tensors = [torch.randn(T, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F), torch.rand(5)]
    leaves = [t.requires_grad_() for t in tensors]
    # Stored pairs end with an expert: rows of one that fits in part only are not written, and compare as noise.
    problem = (2, *leaves, token_N, count_E, None)
    torch.library.opcheck(OPERATORS["cpu"].forward, problem)
    torch.library.opcheck(TRACED.forward, ("cpu", *problem))


def test_operators_and_layer_take_other_strides():
    from remoe.experts.dispatch import OPERATORS, TRACED

    torch.compiler.reset()
    layer = remoe.MoE(16, 24, 3, 1, init_std=0.5)
    x = torch.randn(1, 16, 12).transpose(1, 2).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-4, atol=1e-6)
    count_E, token_N = torch.tensor([2, 0, 3]), torch.tensor([0, 5, 1, 5, 8])
    tensors = [torch.randn(6, 9).t(), torch.randn(3, 6, 8).mT, torch.randn(3, 4, 6).mT, torch.rand(5)]
    leaves = [t.requires_grad_() for t in tensors]
    problem = (2, *leaves, token_N, count_E, None)
    torch.library.opcheck(OPERATORS["cpu"].forward, problem)
    torch.library.opcheck(TRACED.forward, ("cpu", *problem))
