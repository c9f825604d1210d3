"""A record of routing holds what the model did on each token, in the order of the text."""

import sys

import pytest
import torch

import remoe
from remoe.errors import ConfigError
from remoe.lab.analysis import recording
from remoe.lab.analysis.collect import active_of, gates_of
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.record import RecordWriter
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.texts import PreparedText, TokenIds
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.machine import used_memory
from remoe.lab.training.validate import evaluate, total

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
        eos_token_id=0,  # <|endoftext|>
    )
    return remoe.RemoeForCausalLM(config)


def collect(model, windows, max_tokens=None, **options):
    return record_routing(Mixture(model), PreparedText(windows, max_tokens), **options)


def test_rows_are_the_tokens_of_the_windows_in_order(windows):
    made = collect(tiny(), windows)
    record, domains = made.whole(), made.about.domains
    assert domains == ["farm", "town"]
    assert record.sequence_T[0] == 0
    # A new window begins one row after the other, and each window is whole but the last of a domain.
    assert set(record.sequence_T.diff().tolist()) == {0, 1}
    row = sequence = 0
    for index, domain in enumerate(domains):
        for token_1S, _, mask_1S in windows.batches(domain, 1):
            n = int(mask_1S.sum())
            assert torch.equal(record.token_T[row : row + n], token_1S[0, :n])
            assert (record.sequence_T[row : row + n] == sequence).all()
            assert (record.domain_T[row : row + n] == index).all()
            row, sequence = row + n, sequence + 1
    assert row == len(record.token_T) == sum(windows.num_predictions(domain) for domain in domains)
    assert made.about.tokens == row
    assert record.active_LTE.shape == (2, row, 5)


def test_the_choice_is_that_of_the_model(windows):
    model = tiny().train()
    record = collect(model, windows).whole(gates=True)
    assert model.training
    assert 0 < record.active_LTE.float().mean() < 1
    model.eval()
    for sequence in (0, int(record.sequence_T.max())):  # the last one is padded in the batch
        rows = record.sequence_T == sequence
        out = model(record.token_T[rows][None])
        for layer, routing in enumerate(out.routings):
            assert torch.equal(record.active_LTE[layer, rows], routing.gate_TE > 0)
            torch.testing.assert_close(record.gate_LTE[layer, rows], routing.gate_TE)


def test_padding_is_left_out_of_gates_and_choice(windows):
    model = tiny().eval()
    token_BS = torch.randint(300, (2, 6))
    mask_BS = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    gate_LTE = gates_of(model, token_BS, mask_BS)
    assert gate_LTE.shape == (2, 9, 5)
    torch.testing.assert_close(gate_LTE[:, 6:], gates_of(model, token_BS[1:, :3], mask_BS[1:, :3]))
    assert torch.equal(active_of(model, token_BS, mask_BS), gate_LTE > 0)


def test_executed_pairs_count_even_where_a_gate_is_rounded_to_zero(windows):
    model = tiny("topk").eval()
    with torch.no_grad():  # so far apart that a softmax has one, and zeros
        model.model.layers[0].mlp.router.weight.mul_(1e5)
    token_BS = torch.randint(300, (1, SEQ_LEN))
    mask_BS = torch.ones_like(token_BS, dtype=torch.bool)
    assert (gates_of(model, token_BS, mask_BS)[0] == 0).sum(dim=1).max() == 4
    assert (active_of(model, token_BS, mask_BS).sum(dim=2) == 2).all()


def test_collecting_counts_as_no_training_step(windows):
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, windows, 200)
    model.sparsity.update()
    assert model.sparsity.sparsity == before["sparsity.sparsity"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "weight" in name)


def test_topk_has_k_experts_a_token_and_dense_has_no_routing(windows):
    assert (collect(tiny("topk"), windows, 200).whole().active_LTE.sum(dim=2) == 2).all()
    with pytest.raises(ConfigError, match="'dense' does not send single tokens"):
        collect(tiny("dense"), windows, 200)


def test_limit_takes_a_prefix_of_every_domain(windows):
    whole, part = collect(tiny(), windows).whole(), collect(tiny(), windows, 300).whole()
    assert len(part.token_T) < len(whole.token_T)
    for domain in (0, 1):
        tokens = part.token_T[part.domain_T == domain]
        assert len(tokens)
        assert torch.equal(tokens, whole.token_T[whole.domain_T == domain][: len(tokens)])


@pytest.mark.parametrize("document_end", [None, 0])
def test_the_mean_loss_is_that_of_an_evaluation(windows, document_end):
    model = tiny()
    record = collect(model, windows, document_end=document_end).whole()
    expected = evaluate(model, windows, batch_size=7, document_end=document_end)
    assert record.loss_T.mean().item() == pytest.approx(total(expected).loss, rel=1e-5)
    for domain, name in enumerate(windows.domains):
        mean = record.loss_T[record.domain_T == domain].mean().item()
        assert mean == pytest.approx(expected[name].loss, rel=1e-5)
    assert collect(model, windows, 200, losses=False).whole().loss_T.isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = remoe.RemoeConfig(vocab_size=32, num_experts=512, router="topk", num_key_value_heads=1, **sizes)
    token_NS = torch.randint(32, (512, 64))
    held, append = [], RecordWriter.append

    def watched(writer, **rows):
        append(writer, **rows)
        held.append(used_memory(torch.device("cpu")))

    monkeypatch.setattr(RecordWriter, "append", watched)
    monkeypatch.setattr(recording, "CPU_BATCH_TOKENS", 256)
    record = record_routing(Mixture(remoe.RemoeForCausalLM(config)), TokenIds(token_NS), tmp_path / "record.parquet")
    assert record.about.tokens == token_NS.numel()
    half = len(held) // 2
    gates = token_NS.numel() // 2 * 512 * 4  # bytes of those of the second half
    assert max(held[half:]) - max(held[:half]) < gates / 2
