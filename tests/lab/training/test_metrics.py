"""Measures on hand-made courses of S, and the file of records."""

import json

import pytest

from remoe.errors import RemoeError
from remoe.lab.training.metrics import MetricsWriter, read_metrics
from remoe.stages import first_sparse_step, settling_time, stage


def test_settling_time_on_hand_made_courses():
    dense, settled, off = [0.5] * 30, [0.875 + 0.009 * (-1) ** i for i in range(50)], [0.86]
    assert settling_time(dense + settled, 0.875) == 30
    assert settling_time(dense + settled[:49], 0.875) is None
    assert settling_time(dense + settled[:49] + off + settled, 0.875) == 80
    assert settling_time(settled + off * 100, 0.875) == 0
    assert settling_time([], 0.875) is None
    closed, near = [1.0] * 60, [1 - 1.07 / 128] * 50
    assert settling_time(closed + near, 1 - 1 / 128) == 60  # not while every expert is off


@pytest.mark.parametrize(
    ("sparsity", "target", "expected"),
    [
        (0.5, 0.875, "dense"),
        (0.3, 0.875, "dense"),
        (0.7, 0.875, "sparsifying"),
        (0.82, 0.875, "sparse"),
        (0.95, 0.875, "sparse"),
        (0.95, 0.984375, "sparsifying"),
        (0.98, 0.984375, "sparse"),
        (0.0, 0.0, "dense"),
    ],
)
def test_stage(sparsity, target, expected):
    assert stage(sparsity, target) == expected


def test_records_survive_a_cut_and_continue_without_doubles(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=1)
    for step in range(1, 6):
        writer.write({"step": step, "loss": step / 2})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-7])  # a crash in the middle of a line
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    writer = MetricsWriter(tmp_path, first_step=3)
    writer.write({"step": 3, "loss": 9.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in map(json.loads, path.read_text().splitlines())] == [
        (1, 0.5),
        (2, 1),
        (3, 9),
    ]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RemoeError, match="line 2"):
        read_metrics(path)


def test_stage_three_begins_where_it_lasts():
    dense, sparse = [0.5], [0.875]
    assert first_sparse_step(sparse * 10, 0.875) == 1
    assert first_sparse_step(dense * 3 + sparse * 5 + dense * 2 + sparse * 12, 0.875) == 11
    assert first_sparse_step(dense * 3 + sparse * 2, 0.875) == 4
    assert first_sparse_step(sparse * 9 + dense, 0.875) == 11
