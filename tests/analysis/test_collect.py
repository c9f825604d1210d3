"""A record of routing holds what the model did on each token, in the order of the text."""

import json

import pytest
import torch
from safetensors.torch import save_file

import remoe
from remoe.analysis.collect import RoutingRecord, collect
from remoe.data import ValidationWindows, open_dataset
from remoe.errors import DataError

SEQ_LEN = 48


@pytest.fixture
def windows(corpus):
    return ValidationWindows(open_dataset(corpus).validation, SEQ_LEN)


def tiny(router="relu"):
    config = remoe.RemoeConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=2,
        router=router,
        initializer_range=0.2,
        max_position_embeddings=SEQ_LEN,
    )
    return remoe.RemoeForCausalLM(config)


def test_rows_are_the_tokens_of_the_windows_in_order(windows):
    record = collect(tiny(), windows, None, 3)
    assert record.domains == ("farm", "town")
    assert record.sequence_T[0] == 0
    # A new window begins one row after the other, and each window is whole but the last of a domain.
    assert set(record.sequence_T.diff().tolist()) == {0, 1}
    row = sequence = 0
    for index, domain in enumerate(record.domains):
        for token_1S, _, mask_1S in windows.batches(domain, 1):
            n = int(mask_1S.sum())
            assert torch.equal(record.token_T[row : row + n], token_1S[0, :n])
            assert (record.sequence_T[row : row + n] == sequence).all()
            assert (record.domain_T[row : row + n] == index).all()
            row, sequence = row + n, sequence + 1
    assert row == len(record.token_T) == sum(windows.num_predictions(domain) for domain in record.domains)
    assert record.active_LTE.shape == (2, row, 5)


def test_gates_and_choice_are_those_of_the_model(windows):
    model = tiny().train()
    record = collect(model, windows, None, 3, gates=True)
    assert model.training
    assert record.gate_LTE.dtype == torch.float32
    assert torch.equal(record.active_LTE, record.gate_LTE != 0)
    assert 0 < record.active_LTE.float().mean() < 1
    model.eval()
    for sequence in (0, int(record.sequence_T.max())):  # the last one is padded in the batch
        rows = record.sequence_T == sequence
        out = model(record.token_T[rows][None])
        for layer, routing in enumerate(out.routings):
            torch.testing.assert_close(record.gate_LTE[layer, rows], routing.gate_TE, rtol=1e-4, atol=1e-5)


def test_collecting_counts_as_no_training_step(windows):
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, windows, 200, 4)
    model.sparsity.update()
    assert model.sparsity.sparsity == before["sparsity.sparsity"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "weight" in name)


def test_topk_has_k_experts_a_token_and_dense_has_one(windows):
    assert (collect(tiny("topk"), windows, 200, 4).active_LTE.sum(dim=2) == 2).all()
    assert collect(tiny("dense"), windows, 200, 4).active_LTE.shape[2] == 1


def test_limit_takes_a_prefix_of_every_domain(windows):
    whole, part = collect(tiny(), windows, None, 4), collect(tiny(), windows, 300, 4)
    assert len(part.token_T) < len(whole.token_T)
    for domain in (0, 1):
        tokens = part.token_T[part.domain_T == domain]
        assert len(tokens)
        assert torch.equal(tokens, whole.token_T[whole.domain_T == domain][: len(tokens)])


@pytest.mark.parametrize("gates", [True, False])
def test_saving_and_loading_gives_the_same_record(windows, tmp_path, gates):
    record = collect(tiny(), windows, 300, 4, gates=gates)
    record.save(tmp_path / "routing.safetensors")
    loaded = RoutingRecord.load(tmp_path / "routing.safetensors")
    assert loaded.domains == record.domains
    assert (loaded.gate_LTE is None) == (record.gate_LTE is None) == (not gates)
    for name in ("active_LTE", "token_T", "domain_T", "sequence_T") + ("gate_LTE",) * gates:
        assert getattr(loaded, name).dtype == getattr(record, name).dtype
        assert torch.equal(getattr(loaded, name), getattr(record, name))


def test_what_is_no_record_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"none\.safetensors: cannot be read"):
        RoutingRecord.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(DataError, match=r"cut\.safetensors: cannot be read"):
        RoutingRecord.load(tmp_path / "cut.safetensors")
    for name, metadata in {"bare": None, "shard": {"remoe": json.dumps({"format": "remoe-shard"})}}.items():
        save_file({"tokens": torch.zeros(3)}, tmp_path / f"{name}.safetensors", metadata)
        with pytest.raises(DataError, match=rf"{name}\.safetensors is no record of routing"):
            RoutingRecord.load(tmp_path / f"{name}.safetensors")
