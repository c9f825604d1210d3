"""The file of records."""

import json

import pytest

from remoe.errors import RemoeError
from remoe.lab.training.metrics import MetricsWriter, read_metrics


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
