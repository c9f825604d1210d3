"""With weights, each domain has its share of the sequences at any step, and is read evenly."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from remoe.errors import ConfigError, DataError
from remoe.lab.data import Dataset, MixedBatches, TrainBatches, training_batches
from remoe.lab.data.mixture import draw

SEQ_LEN = 31  # odd, and no divisor of anything here
WEIGHTS = {"a": 0.5, "b": 2, "c": 0.1}


def domain_windows(dataset: Dataset, domain: str) -> list[tuple[int, ...]]:
    """The windows of a domain: its documents in each shard, joined and cut."""
    index, found = dataset.domains.index(domain), []
    for shard in dataset.train.shards:
        stream: list[int] = []
        for i in np.flatnonzero(shard.document_domain == index):
            stream += shard.tokens[shard.document_offsets[i] : shard.document_offsets[i + 1]].tolist()
        found += [tuple(stream[i : i + SEQ_LEN + 1]) for i in range(0, len(stream) - SEQ_LEN, SEQ_LEN)]
    return found


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (20, 5), (3, 2, 2, 1), (1,) * 10, (997, 2, 1), (10**9, 1), (7, 7, 5, 3, 3, 1, 1)]
)
def test_shares_hold_for_any_number_of_sequences(weights: tuple[int, ...]) -> None:
    named = {str(i): weight for i, weight in enumerate(weights)}
    bound = (1 + sum(1 / i for i in range(1, len(weights)))) / 2
    counts: Counter[str] = Counter()
    for number in range(500):
        domain, before = draw(number, named)
        assert before == counts[domain]
        counts[domain] += 1
        for name, weight in named.items():
            assert abs(counts[name] - (number + 1) * weight / sum(weights)) <= bound
    far = 10**15 + 7  # as after any number of steps, and exactly
    domain, before = draw(far, named)
    assert abs(before - far * named[domain] / sum(weights)) <= bound + 1


def test_each_sequence_is_of_one_domain_and_each_domain_is_read_evenly(opened: Dataset) -> None:
    batches = MixedBatches(opened.train, SEQ_LEN, 5, 3, WEIGHTS)
    windows = {domain: domain_windows(opened, domain) for domain in WEIGHTS}
    assert {domain: batches.windows(domain) for domain in WEIGHTS} == {d: len(found) for d, found in windows.items()}
    of = {window: domain for domain, found in windows.items() for window in found}
    assert len(of) == sum(map(len, windows.values()))
    steps = 2 * len(windows["b"]) * 26 // 20 // 5 + 1  # b is read twice
    rows = [tuple(row) for step in range(steps) for row in batches.batch(step).tolist()]
    drawn = Counter(of[row] for row in rows)
    for domain, share in batches.shares.items():
        assert abs(drawn[domain] - share * len(rows)) <= 1.25
    assert batches.shares == pytest.approx({"b": 20 / 26, "a": 5 / 26, "c": 1 / 26})
    for domain, found in windows.items():
        read = [row for row in rows if of[row] == domain]
        epochs = [read[i : i + len(found)] for i in range(0, len(read), len(found))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(first[: len(second)] != second for first, second in pairwise(epochs))
        assert read[: len(found)] != found[: len(read)]


def test_a_batch_depends_on_seed_and_step_alone_and_can_be_read_by_ranks(opened: Dataset) -> None:
    turned = dict(reversed(WEIGHTS.items()))
    one, other = (MixedBatches(opened.train, SEQ_LEN, 6, 7, weights) for weights in (WEIGHTS, turned))
    for step in (9, 0, 40):
        whole = one.batch(step)
        assert (whole.shape, whole.dtype) == ((6, SEQ_LEN + 1), torch.int64)
        assert torch.equal(other.batch(step), whole)
        assert torch.equal(torch.cat([one.batch(step, range(r, r + 2)) for r in (0, 2, 4)]), whole)
        assert not torch.equal(MixedBatches(opened.train, SEQ_LEN, 6, 8, WEIGHTS).batch(step), whole)
    with pytest.raises(ConfigError, match="a batch of 6 rows has no rows"):
        one.batch(0, range(5, 7))


def test_without_weights_the_order_is_that_of_the_whole_text(opened: Dataset) -> None:
    assert isinstance(training_batches(opened.train, SEQ_LEN, 6, 7, {}), TrainBatches)
    assert isinstance(training_batches(opened.train, SEQ_LEN, 6, 7, WEIGHTS), MixedBatches)


def test_a_domain_of_weight_zero_is_left_out(opened: Dataset) -> None:
    batches = MixedBatches(opened.train, SEQ_LEN, 4, 0, {"a": 0, "b": 0.0, "c": 3})
    own = set(domain_windows(opened, "c"))
    assert batches.shares == {"c": 1}
    assert all(tuple(row) in own for step in range(5) for row in batches.batch(step).tolist())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "z": 1}, r"no domain 'z' in the training text \(it has a, b, c\)"),
        ({"a": 1}, "no weight for b, c; 0 leaves a domain out"),
        ({"a": 1, "b": -1, "c": 1}, "must be finite and at least 0"),
        ({"a": 1, "b": float("nan"), "c": 1}, "must be finite and at least 0"),
        ({"a": 1, "b": float("inf"), "c": 1}, "must be finite and at least 0"),
        ({"a": 0, "b": 0, "c": 0}, "one of them above 0"),
    ],
)
def test_weights_that_cannot_be(opened: Dataset, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedBatches(opened.train, SEQ_LEN, 4, 0, weights)


def test_a_domain_too_small_for_a_window(opened: Dataset) -> None:
    with pytest.raises(DataError, match=r"domain '[abc]' has \d+ training tokens, and no shard with enough for one"):
        MixedBatches(opened.train, 5000, 4, 0, WEIGHTS)
    with pytest.raises(ConfigError):
        MixedBatches(opened.train, 0, 4, 0, WEIGHTS)
