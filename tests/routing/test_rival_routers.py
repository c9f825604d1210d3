"""The other routing methods against their formulas in plain loops, with gradients."""

import pytest
import reference
import torch
from routing.formulas import D, E, K, T, check, check_penalty, logits, router_and_input, softmax

import remoe
from remoe.errors import ConfigError
from remoe.routing import build_router
from remoe.routing.regularizers import load_balanced_l1_loss


def best(values, k):
    return set(sorted(range(len(values)), key=lambda e: -torch.as_tensor(values[e]).item())[:k])


def kept(row, chosen):
    return [value if e in chosen else value * 0 for e, value in enumerate(row)]


def test_topk_renormalised_and_in_its_warm_up():
    def formula(x64, w64, k=K):
        for row in logits(x64, w64):
            probs = softmax(row)
            chosen = best(probs, k)
            total = sum(probs[e] for e in chosen)
            yield kept([p / total for p in probs], chosen)

    router, x = router_and_input("topk", renormalize=True)
    check(router, x, formula)
    router, x = router_and_input("topk", renormalize=True, gate_scale=3.0)
    check(router, x, lambda x64, w64: [[3 * gate for gate in row] for row in formula(x64, w64)])
    router, x = router_and_input("topk", renormalize=True, warmup_k=4, warmup_steps=2)
    for k in (4, 4, 2, 2):
        x.grad = router.weight.grad = None
        routing = check(router, x, lambda x64, w64, k=k: formula(x64, w64, k))
        assert routing.count_E.sum() == k * T
        router.update_state(torch.zeros(E), torch.zeros(E))


def test_hash_is_the_id_modulo_the_experts():
    router, ids = build_router("hash", D, E, 1), torch.randint(1000, (T,))
    routing = router(torch.randn(T, D), ids_T=ids)
    assert routing.gate_TE.tolist() == [[float(int(i) % E == e) for e in range(E)] for i in ids]
    split = build_router("hash", D, 2 * E, 2)(torch.randn(T, D), ids_T=ids)
    assert torch.equal(split.gate_TE[:, 0::2], routing.gate_TE)  # both halves of the same expert
    assert torch.equal(split.gate_TE[:, 1::2], routing.gate_TE)
    with pytest.raises(ConfigError, match="token ids"):
        router(torch.randn(T, D))


def test_sigmoid_chooses_with_the_bias_and_gates_without_it():
    router, x = router_and_input("sigmoid")
    router.bias_E.copy_(torch.tensor([0.5, -0.5, 0.0, 0.2, -0.1]))

    def formula(x64, w64):
        for row in logits(x64, w64):
            scores = [1 / (1 + (-z).exp()) for z in row]
            chosen = best([s + b for s, b in zip(scores, router.bias_E.tolist(), strict=True)], K)
            total = sum(scores[e] for e in chosen)
            yield kept([s / total for s in scores], chosen)

    check(router, x, formula)
    router.update_state(torch.tensor([0.9, 0.1, 0.4, 0.4, 0.2]), torch.zeros(E))
    assert torch.allclose(router.bias_E, torch.tensor([0.499, -0.499, 0.0, 0.2, -0.099]), atol=1e-6)


def by_choice(scores, k=K):
    """Rows of scores with everything but each expert's round(T k / E) largest set to zero."""
    wanted = round(len(scores) * k / E)
    chosen = [best([row[e] for row in scores], wanted) for e in range(E)]
    return [[s if t in chosen[e] else s * 0 for e, s in enumerate(row)] for t, row in enumerate(scores)]


def test_expert_choice_in_training_and_above_its_cutoffs_at_evaluation():
    router, x = router_and_input("expert_choice")
    routing = check(router, x, lambda x64, w64: by_choice([softmax(row) for row in logits(x64, w64)]))
    assert routing.count_E.tolist() == [round(T * K / E)] * E
    router.update_state(torch.zeros(E), routing.statistic_E)
    router.eval()
    assert torch.equal(router(x).gate_TE, routing.gate_TE)  # the same tokens lie above the cutoffs drawn from them
    router.update_state(torch.zeros(E), routing.statistic_E + 1)
    torch.testing.assert_close(router.cutoff_E, routing.statistic_E + 0.01)


def test_threshold_warms_up_by_choice_and_then_looks_at_its_thresholds_alone():
    router, x = router_and_input("threshold", warmup_steps=1)

    def scores(x64, w64):
        return [[1 / (1 + (-z).exp()) for z in row] for row in logits(x64, w64)]

    routing = check(router, x, lambda x64, w64: by_choice(scores(x64, w64)))
    router.update_state(torch.zeros(E), routing.statistic_E)
    router.cutoff_E += 0.1
    x.grad = router.weight.grad = None
    cutoffs = router.cutoff_E.tolist()
    check(
        router,
        x,
        lambda x64, w64: [kept(row, {e for e in range(E) if row[e] > cutoffs[e]}) for row in scores(x64, w64)],
    )


def relu_norm_gates(x64, w64, scale64):
    for row in logits(x64, w64):
        gates = [torch.clamp(z, min=0) for z in row]
        root = (sum(g * g for g in gates) / E + 1e-6).sqrt()
        yield [g / root * scale64[e] for e, g in enumerate(gates)]


def test_relu_norm_is_the_root_mean_square_norm_of_open_gates():
    router, x = router_and_input("relu_norm")

    def penalty(x64, w64, scale64):
        unscaled = relu_norm_gates(x64, w64, torch.ones_like(scale64))
        return reference.balanced_l1(torch.stack([torch.stack(row) for row in unscaled]), K)

    check_penalty(router, x, relu_norm_gates, penalty)
    assert router(torch.zeros(3, D)).gate_TE.abs().sum() == 0  # no open gate: nothing to divide by


def test_relu_norm_with_the_losses_of_blockffn():
    S, chunk, sharpness = 21, 4, 3.0  # three sequences; the last chunk is shorter

    def untouched(x64, w64, scale64):
        rows = [[torch.clamp(z, min=0) for z in row] for row in logits(x64, w64)]
        total = 0.0
        for start in range(0, T, S):
            for first in range(start, start + S, chunk):
                tokens = range(first, min(first + chunk, start + S))
                for e in range(E):
                    closed = 1.0
                    for t in tokens:
                        closed = closed * (1 - rows[t][e] / sum(rows[t])) if sum(rows[t]) > 0 else closed
                    total = total + (1 - closed) / E * len(tokens)
        return total / T

    def locality(x64, w64, scale64):
        on = [[1 / (1 + (-sharpness * z).exp()) for z in row] for row in logits(x64, w64)]
        nats = [
            -(on[t + 1][e] * on[t][e].log() + (1 - on[t + 1][e]) * (1 - on[t][e]).log())
            for t in range(T)
            if (t + 1) % S
            for e in range(E)
        ]
        return 0.5 * sum(nats) / len(nats)

    router, x = router_and_input("relu_norm", penalty="chunk", chunk=chunk, locality=0.5, sharpness=sharpness)
    x.data *= 0.3  # sigmoids that are not all zero or one
    # A token with a single expert has p = 1, whose logarithm the router bounds: one always-open expert avoids that.
    x.data[:, 0] = 1
    router.weight.data[:2, 0] = 4
    check_penalty(router, x, relu_norm_gates, untouched, seq_len=S)
    check_penalty(router, x, relu_norm_gates, locality, lambda routing: routing.extra_loss, seq_len=S)


def test_relu_scaled_has_a_scale_per_expert_and_penalises_the_entropy():
    router, x = router_and_input("relu_scaled")

    def gates(x64, w64, scale64):
        return [[torch.clamp(z, min=0) * scale64[e] for e, z in enumerate(row)] for row in logits(x64, w64)]

    def entropy(x64, w64, scale64):
        total = 0.0
        for row in gates(x64, w64, scale64):
            shares = [g / (sum(row) + 1e-5) for g in row if g > 0]
            total = total - sum(p * p.log() for p in shares) / T
        return total

    check_penalty(router, x, gates, entropy)


def test_cap_and_dial_keep_the_gates_that_are_largest_in_size():
    router = build_router("relu_scaled", 2, 4, 1, scale_init=1.0, max_experts_per_token=2)
    router.weight.data = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.3, 0.0]])
    router.scale.data[0] = -0.1  # a learned scale may turn negative
    x = torch.tensor([[1.0, 0.0]])
    expected = torch.tensor([[-0.2, 0.0, 0.0, 0.3]])
    torch.testing.assert_close(router(x).gate_TE, expected)
    torch.testing.assert_close(router(x).pruned(0.0, 2).gate_TE, expected)
    assert router(x).pruned(0.25, None).gate_TE.tolist() == [[0.0, 0.0, 0.0, pytest.approx(0.3)]]


@pytest.mark.parametrize("name", ["expert_choice", "threshold"])
def test_cutoffs_without_tokens_and_with_every_expert(name):
    nothing = build_router(name, D, E, K)(torch.zeros(0, D))
    assert nothing.gate_TE.shape == (0, E)
    router, x = router_and_input(name, k=E)
    router.update_state(torch.zeros(E), router(x).statistic_E)
    assert router.eval()(torch.randn(T, D)).count_E.tolist() == [T] * E


def test_relu_gate_scale_and_power_of_the_load():
    router, x = router_and_input("relu", gate_scale=3.0, load_balance_power=2.0)
    plain = build_router("relu", D, E, K)
    plain.load_state_dict(router.state_dict())
    routing, one = router(x), plain(x)
    torch.testing.assert_close(routing.gate_TE, 3 * one.gate_TE)
    load = [E / (K * T) * count for count in one.count_E.tolist()]
    expected = sum(load[e] ** 2 * one.gate_TE[:, e].sum().item() for e in range(E)) / T
    assert routing.regularizer.item() == pytest.approx(expected, rel=1e-5)
    assert load_balanced_l1_loss(one.gate_TE, one.count_E, k=K, num_tokens=T).item() == one.regularizer.item()


@pytest.mark.parametrize("first_segment", ["own", "uniform"])
def test_lory_merges_the_experts_by_the_segment_before(first_segment):
    S, B, segment, F = 10, 3, 4, 6  # the last segment is shorter
    options = {"segment": segment, "first_segment": first_segment}
    layer = remoe.MoE(D, F, E, 1, "lory", router_options=options, init_std=0.5)
    x = torch.randn(B, S, D, requires_grad=True)
    y, routing = layer(x)
    x64, w64, up64, down64 = (
        t.detach().double().requires_grad_()
        for t in (x, layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj)
    )
    rows = []
    for b in range(B):
        for t in range(S):
            here = t // segment
            before = x64[b, max(here - 1, 0) * segment : max(here, 1) * segment].mean(dim=0)
            if here == 0:
                before = before.detach()
            weights = softmax([(before * w_D).sum() for w_D in w64])
            if here == 0 and first_segment == "uniform":
                weights = [torch.tensor(1 / E, dtype=torch.float64)] * E
            merged_up = sum(weight * up64[e] for e, weight in enumerate(weights))
            merged_down = sum(weight * down64[e] for e, weight in enumerate(weights))
            rows.append(reference.expert(x64[b, t], merged_up, merged_down))
    expected = torch.stack(rows).view(B, S, D)
    probe = torch.randn(B, S, D)
    (y * probe).sum().backward()
    (expected * probe.double()).sum().backward()
    pairs = [(y, expected), (x.grad, x64.grad), (layer.router.weight.grad, w64.grad)]
    pairs += [(layer.experts.gate_up_proj.grad, up64.grad), (layer.experts.down_proj.grad, down64.grad)]
    for actual, wanted in pairs:
        assert reference.relative_error(actual, wanted) < 1e-5
    torch.testing.assert_close(routing.gate_TE.sum(dim=1), torch.ones(B * S))


@pytest.mark.parametrize(
    ("name", "k", "options", "words"),
    [
        ("topk", 1, {"warmup_k": 9, "warmup_steps": 3}, "warmup_k must be between"),
        ("topk", 1, {"warmup_steps": 3}, "go together"),
        *((name, 1, {"gate_scale": 0.0}, "gate_scale") for name in ("relu", "topk", "sigmoid")),
        ("relu_norm", 1, {"penalty": "l2"}, "unknown penalty 'l2'"),
        ("relu_scaled", 1, {"penalty": "l2"}, "unknown penalty 'l2'"),
        ("relu_scaled", 1, {"load_balance": False}, "no effect with penalty 'entropy'"),
        ("relu_scaled", 1, {"load_balance_power": 2.0}, "no effect with penalty 'entropy'"),
        ("threshold", 1, {"warmup_steps": 0}, "warmup_steps"),
        ("lory", 2, {}, "must be 1"),
        ("lory", 1, {"first_segment": "x"}, "first_segment"),
        ("hash", 1, {"gate_scale": 1.0}, "gate_scale"),
    ],
)
def test_bad_options_are_named(name, k, options, words):
    with pytest.raises(ConfigError, match=words):
        build_router(name, D, E, k, **options)
