"""Documents packed into a row and told apart by their positions compute what each computes alone."""

import pytest
import torch

import remoe
from remoe.errors import ConfigError
from remoe.models.packing import document_positions, packed_documents

LENGTHS = (7, 1, 9, 4)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "initializer_range": 0.3,
}


def build(**options):
    torch.manual_seed(0)
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES | options))


def packed(padding=(0, 0)):
    ids = torch.randint(97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    parts = [torch.arange(n) for n in LENGTHS]
    position_ids = torch.nn.functional.pad(torch.cat(parts), padding)[None]
    mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
    return torch.nn.functional.pad(ids, padding, value=5), position_ids, mask, ids.split(LENGTHS, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_documents_do_not_see_each_other(attention, padding, training, use_cache):
    model = build(attn_implementation=attention).train(training)
    ids, position_ids, mask, documents = packed(padding or (0, 0))
    given = None if padding is None else mask
    with torch.no_grad():
        together = model(ids, attention_mask=given, position_ids=position_ids, use_cache=use_cache).logits
        alone = torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)
        torch.testing.assert_close(together[mask.bool()], alone[0], rtol=1e-4, atol=1e-5)
        twice = None if given is None else given.repeat(2, 1)
        batch = model(ids.repeat(2, 1), attention_mask=twice, position_ids=position_ids)
        torch.testing.assert_close(batch.logits[1][mask[0].bool()], alone[0], rtol=1e-4, atol=1e-5)


def test_documents_of_rows_with_and_without_padding():
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3], [4, 5, 6, 6, 7, 8]])
    assert packed_documents(positions[:1], None) is None
    assert packed_documents(positions[:2], None).tolist() == [[0] * 6, [0, 0, 1, 1, 1, 2]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    assert packed_documents(positions[2:], mask) is None  # padding on the left, and a hole


def test_neighbours_of_another_document_have_no_part_in_a_loss():
    for options in ({"locality": 1.0}, {"penalty": "chunk", "chunk": 4}):
        model = build(router="relu_norm", router_options=options).train()
        ids, position_ids, mask, documents = packed((0, 3))
        for given, ids_BS, positions in ((mask, ids, position_ids), (None, torch.cat(documents, 1), None)):
            if positions is None:
                positions = position_ids[:, :-3]
            together = model(ids_BS, attention_mask=given, position_ids=positions).routings
            alone = [model(document).routings for document in documents]
            for layer, routing in enumerate(together):
                if "locality" in options:
                    parts = [r[layer].extra_loss * (n - 1) for r, n in zip(alone, LENGTHS, strict=True)]
                    expected, found = sum(parts) / (sum(LENGTHS) - len(LENGTHS)), routing.extra_loss
                else:
                    parts = [r[layer].regularizer * n for r, n in zip(alone, LENGTHS, strict=True)]
                    expected, found = sum(parts) / sum(LENGTHS), routing.regularizer
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_router_that_merges_segments_takes_one_document_a_row():
    model = build(router="lory", router_options={"segment": 4})
    ids, position_ids, mask, _ = packed()
    for training in (True, False):
        for given in (None, mask):
            with pytest.raises(ConfigError, match="would mix the documents packed in a row"):
                model.train(training)(ids, attention_mask=given, position_ids=position_ids)
    assert model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits.isfinite().all()


def test_positions_begin_anew_at_each_end_of_text():
    eos = 9
    token_BS = torch.tensor([[5, 6, eos, 7, eos, eos, 8, 4], [eos, 1, 2, 3, 4, 5, 6, eos], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert document_positions(token_BS, eos).tolist() == [
        [0, 1, 0, 1, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6, 0],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
