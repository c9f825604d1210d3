"""A record can be replayed: the model that made it repeats its pass, and another program's pairs are executed."""

import numpy as np
import pytest
import tiny_models
import torch
from common_models import build, tokens

import remoe
from remoe.errors import ConfigError
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.replaying import replay_of_record
from remoe.lab.analysis.texts import Batch
from remoe.lab.cli.main import main
from remoe.models.replay import replay_routing
from remoe.routing.replay import executed_pairs


class Given:
    """A text of these ids, each sequence with its own length."""

    def __init__(self, ids, lengths):
        self.seq_len, self.identity = ids.shape[1], {}
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        self.batch = Batch("given", ids, torch.full_like(ids, -100), mask)

    def batches(self, rows):
        for part in (slice(0, 1), slice(1, None)):  # sums may be rounded differently in a pass of other size
            yield Batch(self.batch.domain, *(tensor[part] for tensor in self.batch[1:]))


def relufied():
    model, ids = tiny_models.build("mixtral"), tiny_models.token_ids(3, 9)
    remoe.relufy(model, [ids], max_loss_increase=None)
    return model, ids


@pytest.mark.parametrize("make", [lambda: (build(), tokens()), relufied], ids=["remoe", "relufied"])
@pytest.mark.parametrize("keep_gates", [False, True])
@torch.no_grad()
def test_the_model_that_made_it_repeats_its_pass(make, keep_gates):
    model, ids = make()
    text = Given(ids, [9, 5, 9])
    record = record_routing(Mixture(model), text, losses=False)
    replay, token_BS = replay_of_record(record, 9, slice(1, 3), keep_gates=keep_gates)
    assert torch.equal(token_BS, ids[1:].where(text.batch.mask_NS[1:], -1))
    inputs = {"input_ids": ids[1:], "attention_mask": text.batch.mask_NS[1:].long()}
    expected = model(**inputs).logits
    with replay_routing(model, replay):
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_pairs_of_another_program_are_executed(tmp_path):
    model, ids = build(), tokens(2, 6)
    arrays = [np.random.default_rng(i).permuted(np.tile(np.arange(4), (5 - i, 3, 1)), axis=2)[..., :2] for i in (0, 1)]
    for name, array in zip("ab", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    paths = [str(tmp_path / name) for name in ("a.npy", "b.npy")]
    assert main(["record", *paths, "--num-experts", "4", "--out", str(tmp_path / "r.parquet")]) == 0
    record = RoutingRecord(tmp_path / "r.parquet")
    replay, _ = replay_of_record(record, 6)
    with replay_routing(model, replay):
        routings = model(ids).routings
    own = model(ids).routings[0]
    for layer, routing in enumerate(routings):
        pairs_BSE = executed_pairs(routing).view(2, 6, 4)
        for row, array in enumerate(arrays):
            for place, experts in enumerate(array[:, layer]):
                assert pairs_BSE[row, place].nonzero().flatten().tolist() == sorted(experts)
    # The first layer sees the same tokens either way; those without a record are the router's.
    assert torch.equal(executed_pairs(routings[0])[~replay.known_T], executed_pairs(own)[~replay.known_T])
    assert (~replay.known_T).sum() == 12 - 9
    with pytest.raises(ConfigError, match="has no gates"):
        replay_of_record(record, 6, keep_gates=True)
    with pytest.raises(ConfigError, match="5 tokens, but the batch has room for 4"):
        replay_of_record(record, 4)
    with pytest.raises(ConfigError, match="no such sequences"):
        replay_of_record(record, 6, slice(2, 3))
    with pytest.raises(ConfigError, match="must not be negative"):
        replay_of_record(record, 6, slice(-1, None))


@torch.no_grad()
def test_a_batch_with_padding_on_the_left_is_matched_token_for_token():
    model, ids = build(), tokens()
    text = Given(ids, [9, 5, 9])
    record = record_routing(Mixture(model), text, losses=False)
    length = ids.shape[1] + 2
    input_ids, mask = torch.zeros(3, length, dtype=torch.int64), torch.zeros(3, length, dtype=torch.int64)
    for row, n in enumerate([9, 5, 9]):
        input_ids[row, -n:], mask[row, -n:] = ids[row, :n], 1
    batch = {"input_ids": input_ids, "attention_mask": mask}
    replay, token_BS = replay_of_record(record, length, **batch)
    assert torch.equal(token_BS, input_ids.where(mask.bool(), -1))
    expected = model(**batch)
    with replay_routing(model, replay):
        found = model(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert replay.active_LTE[0][mask.flatten().bool()].any()
    input_ids[1, -2] += 1
    with pytest.raises(ConfigError, match=rf"row 1, column {length - 2}: the batch has token {input_ids[1, -2]}"):
        replay_of_record(record, length, **batch)
    mask[2, 2:6] = 0
    with pytest.raises(ConfigError, match="row 2 of the batch has 5 tokens, but its sequence in record has 9"):
        replay_of_record(record, length, attention_mask=mask)
    with pytest.raises(ConfigError, match="input_ids must be"):
        replay_of_record(record, length, input_ids=ids)
