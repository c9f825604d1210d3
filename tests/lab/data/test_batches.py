"""Training visits every window once an epoch, whenever it is asked; validation predicts every token once."""

from collections import Counter

import numpy as np
import pytest
import torch
from small_data import document_texts

from remoe.errors import ConfigError, DataError
from remoe.lab.data import Dataset, TrainBatches, ValidationWindows

SEQ_LEN = 63  # odd, and no divisor of anything here


def all_windows(dataset: Dataset) -> list[tuple[int, ...]]:
    found = []
    for shard in dataset.train.shards:
        tokens = shard.tokens.tolist()
        found += [tuple(tokens[i : i + SEQ_LEN + 1]) for i in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)]
    return found


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(opened: Dataset) -> None:
    batches = TrainBatches(opened.train, SEQ_LEN, 1, seed=0)
    count = batches.windows_per_epoch
    windows = all_windows(opened)
    assert count == len(windows)
    first, second = ([tuple(batches.batch(e * count + i)[0].tolist()) for i in range(count)] for e in (0, 1))
    assert Counter(first) == Counter(second) == Counter(windows)
    assert first != second != windows != first


def test_batch_depends_on_seed_and_step_alone(opened: Dataset) -> None:
    batches = TrainBatches(opened.train, SEQ_LEN, 5, seed=7)
    steps = [0, 40, 3, 200, 40, 1]
    expected = {step: TrainBatches(opened.train, SEQ_LEN, 5, seed=7).batch(step) for step in steps}
    for step in steps:
        assert torch.equal(batches.batch(step), expected[step])
    assert batches.batch(0).shape == (5, SEQ_LEN + 1)
    assert batches.batch(0).dtype == torch.int64
    assert not torch.equal(TrainBatches(opened.train, SEQ_LEN, 5, seed=8).batch(0), batches.batch(0))


def test_batch_size_changes_the_grouping_not_the_order(opened: Dataset) -> None:
    single = TrainBatches(opened.train, SEQ_LEN, 1, seed=3)
    grouped = TrainBatches(opened.train, SEQ_LEN, 7, seed=3)
    steps = single.windows_per_epoch // 7 + 3  # over the end of the first epoch
    flat = torch.cat([grouped.batch(step) for step in range(steps)])
    assert torch.equal(flat, torch.cat([single.batch(step) for step in range(steps * 7)]))


def test_ranks_read_only_their_rows_of_the_same_batch(opened: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = TrainBatches(opened.train, SEQ_LEN, 6, seed=3)
    last = batches.windows_per_epoch // 6  # over the end of the first epoch
    for step in (0, last):
        whole = batches.batch(step)
        for ranks in (1, 2, 3, 6):
            size = 6 // ranks
            parts = [batches.batch(step, range(r * size, (r + 1) * size)) for r in range(ranks)]
            assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(batches.batch(step, range(1, 6, 2)), whole[1::2])
        assert batches.batch(step, range(2, 2)).shape == (0, SEQ_LEN + 1)
    read: list[int] = []
    monkeypatch.setattr("remoe.lab.data.batches.check_ids", lambda shard, start, tokens, size: read.append(len(tokens)))
    batches.batch(0, range(4, 6))
    assert read == [SEQ_LEN + 1] * 2
    for rows in (range(4, 7), range(-1, 2), range(6, 7)):
        with pytest.raises(ConfigError, match="a batch of 6 rows has no rows"):
            batches.batch(0, rows)


def test_too_few_tokens_for_a_window(opened: Dataset) -> None:
    with pytest.raises(DataError, match=r"the train split has \d+ tokens, too few for one window of 5000 \+ 1"):
        TrainBatches(opened.train, 5000, 1, seed=0)
    with pytest.raises(ConfigError):
        TrainBatches(opened.train, 0, 1, seed=0)


def domain_stream(dataset: Dataset, domain: str) -> list[int]:
    index = dataset.domains.index(domain)
    stream: list[int] = []
    for shard in dataset.train.shards:
        for i in np.flatnonzero(shard.document_domain == index):
            stream += shard.tokens[shard.document_offsets[i] : shard.document_offsets[i + 1]].tolist()
    return stream


@pytest.mark.parametrize(("seq_len", "batch_size"), [(63, 4), (1, 3), (64, 1), (100_000, 2)])
def test_validation_predicts_every_token_but_the_first_once(opened: Dataset, seq_len: int, batch_size: int) -> None:
    # the train split, for it has many shards that cut through the domains
    windows = ValidationWindows(opened.train, seq_len)
    assert windows.domains == ("a", "b", "c")
    for domain in windows.domains:
        stream = domain_stream(opened, domain)
        inputs: list[int] = []
        targets: list[int] = []
        for input_NS, target_NS, mask_NS in windows.batches(domain, batch_size):
            assert input_NS.shape == target_NS.shape == mask_NS.shape
            assert input_NS.shape[0] <= batch_size
            assert input_NS.shape[1] == seq_len
            assert (input_NS.dtype, target_NS.dtype, mask_NS.dtype) == (torch.int64, torch.int64, torch.bool)
            assert torch.equal(target_NS == -100, ~mask_NS)
            assert not input_NS[~mask_NS].any()
            inputs += input_NS[mask_NS].tolist()
            targets += target_NS[mask_NS].tolist()
        assert inputs == stream[:-1]
        assert targets == stream[1:]
        assert windows.num_predictions(domain) == len(targets)


def test_validation_bytes_are_those_of_the_text(opened: Dataset) -> None:
    texts = document_texts(opened, opened.train)
    windows = ValidationWindows(opened.train, SEQ_LEN)
    for domain in opened.domains:
        own = [text for name, text in texts if name == domain]
        assert windows.bytes(domain) == sum(len(text.encode()) for text in own)


def test_limited_validation_takes_whole_documents(opened: Dataset) -> None:
    windows = ValidationWindows(opened.train, SEQ_LEN)
    own = [text for name, text in document_texts(opened, opened.train) if name == "b"]
    lengths = np.diff([i for i, t in enumerate(domain_stream(opened, "b"), 1) if t == opened.eos_token_id], prepend=0)
    for count in (1, 2, len(own) // 2, len(own)):
        tokens = int(lengths[:count].sum())
        for limit in (tokens, tokens + int(lengths[count]) - 1 if count < len(own) else tokens + 999):
            assert windows.num_predictions("b", limit) == tokens - 1
            assert windows.bytes("b", limit) == sum(len(text.encode()) for text in own[:count])
            assert sum(int(mask.sum()) for *_, mask in windows.batches("b", 3, limit)) == tokens - 1
    assert windows.bytes("b", 1) == len(own[0].encode())  # never nothing


def test_unknown_domain_names_those_present(opened: Dataset) -> None:
    with pytest.raises(DataError, match=r"no domain 'z' in validation \(it has a, b, c\)"):
        list(ValidationWindows(opened.validation, 8).batches("z", 1))
