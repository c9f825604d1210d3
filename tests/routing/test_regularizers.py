"""Regularisers on hand-made cases; with their routers they are in test_rival_routers.py."""

import math

import pytest
import torch

from remoe.routing.auxiliary_losses import chunk_sparsity_loss, gate_entropy, locality_loss
from remoe.routing.regularizers import closed_distance, closed_loss, starved_loss


def test_losses_of_blockffn_on_hand_made_cases():
    # Two sequences of three tokens, chunks of two: {0, 1}, {2}, {3, 4}, {5}.
    gate = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    # experts needed per chunk: both 1; p = 1/2 each: mean 1/2; one of two: 1/2; nothing: 0
    values = [1.0, 1.0, 0.5, 0.5, 0.5, 0.0]
    loss = chunk_sparsity_loss(gate, None, seq_len=3, chunk=2, num_tokens=6)
    assert loss.item() == pytest.approx(sum(values) / 6, abs=1e-5)
    mask = torch.tensor([True, True, True, True, True, False])
    masked = chunk_sparsity_loss(gate, mask, seq_len=3, chunk=2, num_tokens=5)
    assert masked.item() == pytest.approx(sum(values) / 5, abs=1e-5)

    logit = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5], [0.1, 0.2], [0.3, 0.1], [5.0, 5.0]])

    def nats(now, then):
        p, q = 1 / (1 + math.exp(-3 * now)), 1 / (1 + math.exp(-3 * then))
        return -(q * math.log(p) + (1 - q) * math.log(1 - p))

    neighbours = [(0, 1), (1, 2), (3, 4), (4, 5)]
    per_pair = [sum(nats(logit[a, e].item(), logit[b, e].item()) for e in range(2)) / 2 for a, b in neighbours]
    loss = locality_loss(logit, None, seq_len=3, sharpness=3.0)
    assert loss.item() == pytest.approx(sum(per_pair) / 4, rel=1e-5)
    loss = locality_loss(logit, mask, seq_len=3, sharpness=3.0)
    assert loss.item() == pytest.approx(sum(per_pair[:3]) / 3, rel=1e-5)


def test_entropy_has_finite_gradients_at_closed_gates():
    gate = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    loss = gate_entropy(gate, num_tokens=3)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 3, abs=1e-4)
    assert torch.isfinite(gate.grad).all()


def test_the_closed_loss_pulls_the_more_the_less_of_its_share_an_expert_has():
    # Four tokens, k = 1 of E = 4: a balanced expert has one, as the third. The others have three, none and none.
    logits = torch.tensor([[1.0, -1, -1, -1], [2, -0.5, -1, -1], [3, -2, 4, -1], [-2, -0.25, -1, -1]]).requires_grad_()
    count = (logits > 0).sum(dim=0)
    distance = closed_distance(logits, num_tokens=4)
    assert distance.tolist() == pytest.approx([2 / 4, 3.75 / 4, 3 / 4, 4 / 4])
    loss = closed_loss(distance, count, k=1, num_tokens=4)
    assert loss.item() == pytest.approx((2 * (1 + 0.5 + 2 + 0.25) + 1 * 3 + 2 * 4) / 4)
    loss.backward()
    assert (-4 * logits.grad).tolist() == [[0, 2, 1, 2], [0, 2, 1, 2], [0, 2, 0, 2], [0, 2, 1, 2]]
    assert closed_loss(distance, 2 * count, k=1, num_tokens=8).item() == pytest.approx(loss.item())


def test_the_starved_loss_is_of_experts_with_less_than_a_quarter_of_their_share():
    # 240 tokens, k = 1 of E = 4, whose share is 60: with ten more than were counted, 15 are too many.
    distance = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert starved_loss(distance, torch.tensor([200, 5, 4, 0]), k=1, num_tokens=240) == 1100


def test_a_batch_that_is_too_small_to_tell_has_no_starved_expert():
    distance, count = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    assert starved_loss(distance, count, k=1, num_tokens=160) == 0  # 40 tokens each, a quarter of which are ten
    assert starved_loss(distance, count, k=1, num_tokens=161) == 4
