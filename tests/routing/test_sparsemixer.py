"""SparseMixer-v2 against its formula in plain loops, with gradients."""

import math

import pytest
import torch
from routing.formulas import E, T, check, check_penalty, logits, router_and_input, softmax

from remoe.routing import build_router


def largest_and_near(row, drawn):
    """The expert with the largest logit among those left, and all of these that come near it."""
    values = {e: row[e].item() for e in range(E) if e not in drawn}
    largest = max(values, key=values.get)
    top = values[largest]
    return largest, [e for e, value in values.items() if (top - value) / max(abs(value), top) <= 0.2]


def gates_at_evaluation(x64, w64, k):
    for row in logits(x64, w64):
        gates, drawn = [z * 0 for z in row], set()
        for _ in range(k):
            expert, near = largest_and_near(row, drawn)
            gates[expert] = row[expert].exp() / sum(row[e].exp() for e in near)
            drawn.add(expert)
        yield gates


@pytest.mark.parametrize("k", [1, 2])
def test_sparsemixer_takes_the_largest_at_evaluation(k):
    router, x = router_and_input("sparsemixer", k=k)
    router.eval()

    check(router, x, lambda x64, w64: gates_at_evaluation(x64, w64, k))


def test_sparsemixer_samples_in_training_and_differentiates_the_softmax():
    router = build_router("sparsemixer", 1, 3, 1)
    # Logits 1.0, 0.9 and -1 for every token: the third is out of reach, the second is drawn with probability pi.
    router.weight.data = torch.tensor([[1.0], [0.9], [-1.0]])
    x = torch.ones(40_000, 1, requires_grad=True)
    routing = router(x)
    pi = 1 / (1 + math.exp(-0.1))
    share = routing.count_E / len(x)
    assert share[0].item() == pytest.approx(pi, abs=0.01)
    assert share[1].item() == pytest.approx(1 - pi, abs=0.01)
    assert share[2] == 0
    second = routing.gate_TE[:, 1][routing.gate_TE[:, 1] > 0]
    whole = second > 0.4  # 1 - pi, or a third of it
    assert whole.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(second[~whole], torch.full_like(second[~whole], (1 - pi) / 3))
    (gradient,) = torch.autograd.grad(routing.gate_TE.sum(), router.weight)
    # d pi_e / d z_e = pi_e (1 - pi_e), whatever m is; the other's is the negative
    expected = pi * (1 - pi) * (routing.count_E[0] - routing.count_E[1]).item()
    assert gradient.flatten().tolist() == pytest.approx([expected, -expected, 0.0], rel=1e-3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sparsemixer_in_training_with_the_same_draws(k):
    router, x = router_and_input("sparsemixer", k=k)
    torch.manual_seed(5)
    noise = [(-torch.empty(T, E).exponential_().log(), torch.rand(T, 1)) for _ in range(k)]

    def formula(x64, w64):
        for t, row in enumerate(logits(x64, w64)):
            gates, drawn = [z * 0 for z in row], set()
            for gumbel_TE, coin_T1 in noise:
                largest, near = largest_and_near(row, drawn)
                expert = max(near, key=lambda e: row[e].item() + gumbel_TE[t, e].item())
                pi = row[expert].exp() / sum(row[e].exp() for e in near)
                m = 1 if expert == largest or coin_T1[t] > 0.75 else 1 / 3
                gates[expert] = pi + ((m - 1) * pi).detach()
                drawn.add(expert)
            yield gates

    torch.manual_seed(5)
    check(router, x, formula)


@pytest.mark.parametrize("k", [1, 2])
def test_sparsemixer_balances_by_the_switch_loss(k):
    router, x = router_and_input("sparsemixer", k=k)
    router.eval()
    counts = router(x).count_E.tolist()

    def balance(x64, w64, scale64):
        probs = [softmax(row) for row in logits(x64, w64)]
        return E * sum(counts[e] / (k * T) * sum(row[e] for row in probs) / T for e in range(E))

    check_penalty(router, x, lambda *leaves: gates_at_evaluation(*leaves[:2], k), balance)
