"""A record holds what was written, is read in whole sequences, and gives the numbers of the measures on all of it."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from remoe.errors import DataError
from remoe.lab.analysis import measures, summary
from remoe.lab.analysis.record import About, RecordWriter, RoutingRecord, is_record
from remoe.lab.analysis.summary import CHUNK, routing_of

L, T, E = 3, 900, 5


@pytest.fixture(scope="module")
def rows():
    """Random rows: sequences of 30 tokens, three domains of which one has none, one expert that is never used."""
    generator = torch.Generator().manual_seed(0)
    active_LTE = torch.rand(L, T, E, generator=generator) < 0.3
    active_LTE[1, :, 2] = False
    gate_LTE = torch.randn(L, T, E, generator=generator) * active_LTE
    token_T = torch.randint(12, (T,), generator=generator)
    sequence_T = torch.arange(T) // 30
    domain_T = torch.where(sequence_T < 7, 0, 2)
    loss_T = torch.rand(T, generator=generator)
    loss_T[::30] = torch.nan
    return active_LTE, token_T, domain_T, sequence_T, ["a", "b", "c"], gate_LTE, loss_T


def record_of(rows, **options):
    *plain, gate_LTE, loss_T = rows
    return RoutingRecord.of(*plain, gate_LTE=gate_LTE, loss_T=loss_T, texts=[f"t{i}" for i in range(T)], **options)


def test_what_was_written_is_read(rows):
    active_LTE, token_T, domain_T, sequence_T, domains, gate_LTE, loss_T = rows
    record = record_of(rows, k=2)
    block = record.whole(gates=True, texts=True)
    assert (record.about.layers, record.about.experts, record.about.k, record.about.tokens) == (L, E, 2, T)
    assert record.about.domains == domains
    assert torch.equal(block.active_LTE, active_LTE)
    assert torch.equal(block.gate_LTE, gate_LTE)
    assert torch.equal(block.token_T, token_T)
    assert torch.equal(block.domain_T, domain_T)
    assert torch.equal(block.sequence_T, sequence_T)
    assert torch.equal(block.loss_T.nan_to_num(-1), loss_T.nan_to_num(-1))
    assert block.texts == [f"t{i}" for i in range(T)]


def test_columns_are_those_of_the_documentation(rows):
    table = pq.read_table(pa.BufferReader(record_bytes(rows)))
    assert table.schema.field("experts_2").type == pa.list_(pa.uint16())
    assert table.schema.field("gates_2").type == pa.list_(pa.float32())
    assert table.column_names[:5] == ["sequence", "domain", "token", "text", "loss"]
    first = rows[0][2, 0].nonzero().flatten().tolist()
    assert table["experts_2"][0].as_py() == first
    assert table["gates_2"][0].as_py() == rows[5][2, 0, first].tolist()
    assert table["loss"][0].as_py() is None


def record_bytes(rows):
    import io

    *plain, gate_LTE, loss_T = rows
    active_LTE, token_T, domain_T, sequence_T, domains = plain
    sink = io.BytesIO()
    with RecordWriter(sink, About(L, E, 1, "relu")) as writer:
        for start in range(0, T, 70):  # the pieces need not be whole sequences
            part = slice(start, start + 70)
            writer.append(
                sequence_T=sequence_T[part],
                domains=[domains[i] for i in domain_T[part]],
                active_LTE=list(active_LTE[:, part]),
                gate_LTE=list(gate_LTE[:, part]),
                token_T=token_T[part],
                loss_T=loss_T[part],
            )
    return sink.getvalue()


@pytest.mark.parametrize("size", [1, 7, 30, 31, 64, 900, 5000])
def test_blocks_are_whole_sequences_and_together_everything(rows, size):
    record = RoutingRecord(record_bytes(rows))
    blocks = list(record.blocks((2, 0), rows=size))
    whole = record.whole()
    assert torch.equal(torch.cat([block.active_LTE for block in blocks], dim=1), whole.active_LTE[[2, 0]])
    assert torch.equal(torch.cat([block.sequence_T for block in blocks]), whole.sequence_T)
    assert all(block.gate_LTE is None for block in blocks)
    ends = [set(block.sequence_T.tolist()) for block in blocks]
    assert sum(map(len, ends)) == 30  # no sequence is in two blocks
    assert max(len(block.sequence_T) for block in blocks) <= size + 30


def test_the_summary_of_blocks_is_that_of_the_whole(rows, monkeypatch):
    active_LTE, token_T, domain_T, sequence_T, *_ = rows
    monkeypatch.setattr(summary, "MIN_COUNT", 70)
    monkeypatch.setattr("remoe.lab.analysis.record.BLOCK_ROWS", 100)
    found = routing_of(record_of(rows, k=1), str)
    figures, rounded = found.figures, summary.rounded
    share_LE = measures.routed_share(active_LTE)
    assert found.share_LE == rounded(share_LE.tolist())
    assert found.domains == ["a", "c"]
    by_domain = measures.routed_share_by_domain(active_LTE, domain_T, 3)[[0, 2]]
    assert found.share_CLE == rounded(by_domain.tolist())
    assert figures.inactive_experts == measures.inactive_experts(share_LE, 1).sum() == 1
    assert figures.sparsity_per_layer == pytest.approx(measures.sparsity_per_layer(active_LTE).tolist())
    assert figures.load_imbalance_per_layer == rounded(measures.load_imbalance(active_LTE).tolist())
    special = measures.specialisation(active_LTE, domain_T, 3).normalised_L
    assert figures.specialisation_per_layer == rounded(special.tolist())
    chunks = measures.chunk_sparsity(active_LTE, sequence_T, CHUNK)
    assert figures.chunk_sparsity_per_layer == rounded(chunks.tolist())
    assert figures.expert_reuse_per_layer == rounded(measures.expert_reuse(active_LTE, sequence_T).tolist())
    by_token = measures.active_by_token(active_LTE, token_T, min_count=70)
    assert 0 < len(found.count_U) < 12
    assert found.count_U == by_token.count_U.tolist()
    assert found.active_U == rounded(by_token.active_U.tolist())
    assert figures.frequency_correlation == pytest.approx(by_token.frequency_correlation)
    tops = measures.top_tokens(active_LTE[2], token_T, summary.TOP, min_count=summary.TOP_MIN_COUNT)
    assert found.top_tokens[2] == [[str(top.token) for top in one] for one in tops]


def test_unknown_ids_texts_and_gates(rows):
    import io

    sink = io.BytesIO()
    with RecordWriter(sink, About(L, E, 1, "topk", gates=False)) as writer:
        writer.append(sequence_T=rows[3], domains=["a"] * T, active_LTE=list(rows[0]))
    record = RoutingRecord(sink.getvalue())
    block = record.whole(gates=True, texts=True)
    assert block.gate_LTE is None
    assert block.texts == [None] * T
    assert set(block.token_T.tolist()) == {-1}
    assert block.loss_T.isnan().all()
    assert record.about.tokens_sha256 == ""
    found = routing_of(record)
    assert found.count_U == []
    assert found.top_tokens == [[[]] * E] * L
    assert found.share_LE == summary.rounded(measures.routed_share(rows[0]).tolist())


def test_tokens_have_one_hash_however_they_are_written(rows):
    hashes = {record_of(rows).about.tokens_sha256, RoutingRecord(record_bytes(rows)).about.tokens_sha256}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


def test_other_and_damaged_files_are_refused(rows, tmp_path):
    path = tmp_path / "r.parquet"
    for content in (b"PAR1 and nothing", record_bytes(rows)[:-9]):
        path.write_bytes(content)
        assert is_record(path)
        with pytest.raises(DataError, match=r"r\.parquet: cannot be read"):
            RoutingRecord(path)
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="not a record of routing"):
        RoutingRecord(path)
    described = {"format": "remoe-routing", "version": 2}
    pq.write_table(pa.table({"text": ["a"]}).replace_schema_metadata({"remoe": json.dumps(described)}), path)
    with pytest.raises(DataError, match="version 2"):
        RoutingRecord(path)
    assert not is_record(tmp_path)
    assert math.isnan(RoutingRecord(record_bytes(rows)).whole().loss_T[0])
