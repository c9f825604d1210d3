"""What tests of a router against its formula in plain loops share."""

import reference
import torch

from remoe.routing import build_router

T, D, E, K = 63, 20, 5, 2


def router_and_input(name, k=K, **options):
    router = build_router(name, D, E, k, **options)
    router.reset_parameters(std=1.0)
    return router, torch.randn(T, D, requires_grad=True)


def check(router, x, formula):
    """Gates and the gradients of x and the router's weight equal those of `formula(x64, w64) -> list of rows`."""
    routing = router(x)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, router.weight))
    expected = torch.stack([torch.stack(row) for row in formula(x64, w64)])
    probe = torch.randn(T, E)
    (routing.gate_TE * probe).sum().backward()
    (expected * probe.double()).sum().backward()
    assert reference.relative_error(routing.gate_TE, expected) < 1e-5
    assert reference.relative_error(x.grad, x64.grad) < 1e-5
    assert reference.relative_error(router.weight.grad, w64.grad) < 1e-5
    assert torch.equal(routing.count_E, (routing.gate_TE != 0).sum(dim=0))
    return routing


def logits(x64, w64):
    return [[(x_D * w_D).sum() for w_D in w64] for x_D in x64]


def softmax(row):
    total = sum(z.exp() for z in row)
    return [z.exp() / total for z in row]


def check_penalty(router, x, gates, penalty, loss_of=lambda routing: routing.regularizer, **kwargs):
    """`gates(x64, w64, scale64)` and `penalty` of the same against the router's: values, and gradients of all three."""
    scale = getattr(router, "scale", None)
    if scale is not None:
        scale.data.uniform_(0.5, 2.0)
    leaves = [x, router.weight] + ([] if scale is None else [scale])
    x64, w64, *rest = leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scale64 = rest[0] if rest else torch.ones(E, dtype=torch.float64)
    routing = router(x, **kwargs)
    rows, loss64 = gates(x64, w64, scale64), penalty(x64, w64, scale64)
    expected = torch.stack([torch.stack(list(row)) for row in rows])
    probe = torch.randn(T, E)
    loss = loss_of(routing)
    assert reference.relative_error(routing.gate_TE, expected) < 1e-5
    assert reference.relative_error(loss, loss64) < 1e-5
    for total, total64 in ((loss, loss64), ((routing.gate_TE * probe).sum(), (expected * probe.double()).sum())):
        actual = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
        wanted = torch.autograd.grad(total64, leaves64, retain_graph=True, materialize_grads=True)
        for a, w in zip(actual, wanted, strict=True):
            assert reference.relative_error(a, w) < 1e-5
        assert actual[0].any()
        assert actual[1].any()
