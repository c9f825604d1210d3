"""Files of other programs become records of the same pairs; what is not such a file is refused with its place."""

import json
import re

import numpy as np
import pytest

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.cli.main import main
from remoe.lab.report.packed import unpacked

EXPERTS = np.array([[[0, 3], [1, 2]], [[3, 1], [2, 0]], [[2, 0], [0, 1]]], dtype=np.int16)  # (T, L, K)


def pairs(record):
    """The experts of each token and layer, as sets."""
    active_LTE = record.whole().active_LTE
    return [[set(active_E.nonzero().flatten().tolist()) for active_E in active_TE] for active_TE in active_LTE]


def expected(*arrays):
    experts_TLK = np.concatenate(arrays)
    return [[set(experts_K.tolist()) for experts_K in experts_TLK[:, layer]] for layer in range(2)]


def imported(tmp_path, *files, experts=4):
    out = tmp_path / "r.parquet"
    assert main(["record", *map(str, files), "--num-experts", str(experts), "--out", str(out)]) == 0
    return RoutingRecord(out)


def test_arrays_of_requests_are_sequences(tmp_path):
    np.save(tmp_path / "a.npy", EXPERTS)
    np.savez(tmp_path / "b.npz", routed_experts=EXPERTS[:2], token_ids=np.array([7, 8]))
    record = imported(tmp_path, tmp_path / "a.npy", tmp_path / "b.npz")
    assert pairs(record) == expected(EXPERTS, EXPERTS[:2])
    assert (record.about.experts, record.about.k, record.about.gates) == (4, 2, False)
    assert record.about.domains == ["a", "b"]
    block = record.whole()
    assert block.sequence_T.tolist() == [0, 0, 0, 1, 1]
    assert block.token_T.tolist() == [-1, -1, -1, 7, 8]


def write_trace(path, steps):
    """One line for each layer of each (rank, step, experts); layers are numbered as in the whole model."""
    lines = [
        {"rank": rank, "step": step, "layer": 2 * layer + 1, "top_indices": experts[:, layer].tolist()}
        for rank, step, experts in steps
        for layer in (0, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_has_every_token_of_its_steps_and_micro_batches(tmp_path):
    steps = [(0, 1, EXPERTS), (0, 1, EXPERTS[1:]), (0, 2, EXPERTS[:1])]  # a step of two micro-batches, and another
    record = imported(tmp_path, write_trace(tmp_path / "router_trace_rank0.jsonl", steps))
    assert pairs(record) == expected(EXPERTS, EXPERTS[1:], EXPERTS[:1])
    assert record.whole().sequence_T.tolist() == [0, 1, 2, 3, 4, 5]  # no neighbours


def test_an_imported_record_has_a_report(tmp_path):
    np.save(tmp_path / "a.npy", EXPERTS)
    imported(tmp_path, tmp_path / "a.npy")
    assert main(["report", str(tmp_path / "r.parquet")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "2 layers of 4; target: 2 per token" in text
    content = json.loads(re.search(r'<script id="content" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    (shown,) = content["text"]["texts"]
    assert not content["text"]["gatesKnown"]
    assert shown["gate"] is None
    assert unpacked(shown["expert"])[:2].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.array(3), "not whole numbers of shape"),
        (EXPERTS[0], "not whole numbers of shape"),
        (EXPERTS.astype(float), "not whole numbers of shape"),
        (EXPERTS + 1, "expert 4 is not one of 4"),
        (EXPERTS - 1, "expert -1 is not one of 4"),
        (EXPERTS[:0], "no routed token"),
    ],
)
def test_other_arrays_are_refused(tmp_path, capsys, content, said):
    np.save(tmp_path / "a.npy", content)
    assert main(["record", str(tmp_path / "a.npy"), "--num-experts", "4", "--out", str(tmp_path / "r.parquet")]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: not a line of a routing trace"),
        ('{"rank": 0, "step": 1, "layer": 1}', "line 1: not a line of a routing trace"),
        (
            '{"rank": 0, "step": 1, "layer": 1, "top_indices": [[0]]}\n'
            '{"rank": 0, "step": 1, "layer": 3, "top_indices": [[0], [1]]}',
            "different numbers of tokens",
        ),
        (
            '{"rank": 0, "step": 1, "layer": 1, "top_indices": [[0]]}\n'
            '{"rank": 0, "step": 2, "layer": 1, "top_indices": [[0, 1]]}',
            "(1, 2), but (1, 1) before it",
        ),
        ("", "no routed token"),
    ],
)
def test_other_traces_are_refused(tmp_path, capsys, text, said):
    (tmp_path / "a.jsonl").write_text(text)
    assert main(["record", str(tmp_path / "a.jsonl"), "--num-experts", "4", "--out", str(tmp_path / "r.parquet")]) == 2
    assert said in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, capsys):
    np.save(tmp_path / "a.npy", EXPERTS)
    (tmp_path / "b.npz").write_bytes(b"PK")
    (tmp_path / "mine.parquet").write_text("my notes")
    array, out = str(tmp_path / "a.npy"), ["--out", str(tmp_path / "r.parquet")]
    for argv, said in {
        (array, *out): "--num-experts",
        (array, "--num-experts", "4", "--prompt", "a", *out): "do not go with files",
        (array, str(tmp_path), "--num-experts", "4", *out): "is not a file of another program",
        (str(tmp_path / "b.npz"), "--num-experts", "4", *out): "b.npz: cannot be read",
        (str(tmp_path), "--num-experts", "4", *out): "for files of other programs",
        (str(tmp_path), "--prompt", "a", "--data", "b", *out): "do not go together",
        (array, "--num-experts", "4", "--out", str(tmp_path / "mine.parquet")): "is not a file that this command",
        (array, "--num-experts", "4", "--out", str(tmp_path / "no" / "r")): "is not a folder",
    }.items():
        assert main(["record", *argv]) == 2
        message = capsys.readouterr().err
        assert said in message, argv
        assert message.count("\n") == 1
