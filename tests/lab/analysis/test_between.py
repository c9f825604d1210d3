"""Flow, predictability, co-activation and contexts on masks whose results were worked out by hand."""

import math

import pytest
import torch

from remoe.lab.analysis.between import coactivation, flow, nearest, predictability, strongest_contexts
from remoe.lab.analysis.record import RoutingRecord

NAN = pytest.approx(math.nan, nan_ok=True)


def active(*layers):
    """(L, T, E) bool from a string a layer: words are tokens, digits their experts' states."""
    return torch.tensor([[[digit == "1" for digit in token] for token in layer.split()] for layer in layers])


def record_of(active_LTE, sequences=None, **options):
    T = active_LTE.shape[1]
    zero_T = torch.zeros(T, dtype=torch.int64)
    sequence_T = zero_T if sequences is None else torch.tensor(sequences)
    return RoutingRecord.of(active_LTE, zero_T, zero_T, sequence_T, ["a"], **options)


@pytest.fixture(params=[1, 100], ids=["a sequence at a time", "at once"], autouse=True)
def block_rows(request, monkeypatch):
    monkeypatch.setattr("remoe.lab.analysis.record.BLOCK_ROWS", request.param)


def test_flow_is_the_share_of_an_experts_tokens_that_the_next_layer_sends_to_another():
    record = record_of(active("100 100 110 000", "010 011 001 100"), [0, 0, 1, 2])
    # Expert 0 of layer 0 has tokens 0, 1, 2, which have in layer 1: {1}, {1, 2}, {2}. Expert 1 has token 2 alone.
    assert flow(record, 1).tolist() == [[0, 2 / 3, 2 / 3], [0, 0, 1], [NAN, NAN, NAN]]
    assert nearest(flow(record, 1), 1) == [[(1, 2 / 3)], [(2, 1.0)], []]


def test_experts_are_near_that_share_their_tokens():
    record = record_of(active("1100 1100 1000 0110 0000"), [0, 0, 1, 1, 2])
    # Tokens: expert 0 {0, 1, 2}, 1 {0, 1, 3}, 2 {3}; both of 0 and 1: 2 of 4; of 1 and 2: 1 of 3.
    near_EE = coactivation(record, 0)
    assert near_EE[:3].tolist() == [[1, 0.5, 0, 0], [0.5, 1, 1 / 3, 0], [0, 1 / 3, 1, 0]]
    assert near_EE[3, 3].item() == NAN
    assert nearest(near_EE, 2, others=True) == [[(1, 0.5)], [(0, 0.5), (2, 1 / 3)], [(1, 1 / 3)], []]


def test_a_layer_is_guessed_from_the_layers_before():
    # Even sequences count: expert 0 -> 0 twice, 0 -> 1 once, 1 -> 2 once. Load of layer 1: 2/4, 1/4, 1/4.
    even = ("100 100 100 010", "100 100 010 001")
    # Odd ones are guessed for: 0 -> {0} right, 0 -> {2} wrong, 1 -> {2} right; {0, 1} is guessed for the fourth
    # token, of which one is right; the fifth has no expert before and is guessed by load; the sixth has none.
    odd = ("100 100 010 100 000 100", "100 001 001 011 100 000")
    record = record_of(active(*(" ".join(both) for both in zip(even, odd, strict=True))), [0] * 4 + [1] * 6)
    found = predictability(record, 1)
    # By load: {0}, {0}, {0}, {0, 1} and {0}: right for the first and the fifth, and half for the fourth.
    assert found.by_load == pytest.approx((1 + 0 + 0 + 0.5 + 1) / 5)
    assert found.from_one == pytest.approx((1 + 0 + 1 + 0.5 + 1) / 5)
    assert found.from_two == NAN
    first = predictability(record, 0)
    assert first.by_load == pytest.approx((1 + 1 + 0 + 1 + 1) / 5)
    assert (first.from_one, first.from_two) == (NAN, NAN)


def test_two_layers_may_say_more_than_one():
    # Layer 2 repeats layer 0; layer 1 is always expert 0.
    layers = ("10 10 01 01 01", "10 10 10 10 10", "10 10 01 01 01")
    record = record_of(active(*(f"{one} {one}" for one in layers)), [0] * 5 + [1] * 5)
    found = predictability(record, 2)
    assert found.by_load == found.from_one == pytest.approx(3 / 5)
    # P(. | layer 1) = (2/5, 3/5) and P(. | layer 0) = (1, 0) or (0, 1): the mean is right each time.
    assert found.from_two == 1


def test_nothing_is_guessed_from_one_sequence():
    assert predictability(record_of(active("10 01", "10 01")), 1) == (NAN, NAN, NAN)
    assert predictability(record_of(active("10 01", "10 01"), [1, 1]), 1) == (NAN, NAN, NAN)


def test_contexts_are_those_of_the_largest_gates():
    gate_LTE = torch.tensor([[[0.1, 0.0], [0.9, -2.0], [0.4, 0.0], [0.9, math.nan], [0.0, 0.0]]])
    active_LTE = torch.tensor([[[1, 0], [1, 1], [1, 0], [1, 1], [0, 1]]]).bool()
    texts = ["the", " cow", " eats", " hay", "."]
    record = record_of(active_LTE, [0, 0, 0, 1, 1], gate_LTE=gate_LTE, texts=texts)
    first, second = strongest_contexts(record, 0, 2)
    gate = pytest.approx(0.9)
    assert first == [("the", " cow", " eats", gate), ("", " hay", ".", gate)]
    assert second == [("the", " cow", " eats", -2), (" hay", ".", "", 0)]
    assert strongest_contexts(record_of(active_LTE, texts=texts), 0, 2) == [[], []]
    assert strongest_contexts(record_of(active_LTE, gate_LTE=gate_LTE), 0, 2) == [[], []]
