"""`remoe bench diff`: ratios, spreads, and what differs between two files."""

import json

import pytest

from remoe.lab.cli.main import main

SIZES = {"T": 1, "D": 2, "F": 3, "E": 4, "k": 1}


def measured(path, milliseconds, spread=0.05, rate=1e11, **machine):
    row = {**SIZES, "milliseconds": milliseconds}
    if spread is not None:
        row["spread"] = dict.fromkeys(milliseconds, spread)
    content = {"machine": {"cpu": "Xeon", "threads": 2, **machine}, "dtype": "float32", "rows": [row]}
    path.write_text(json.dumps({**content, "roofline": {"gemm_flops": rate}}))
    return str(path)


def rows_of(text):
    return {line.split("  ")[1]: line.split() for line in text.splitlines() if line.startswith("  ")}


def test_ratios_and_what_differs(tmp_path, capsys):
    a = measured(tmp_path / "a.json", {"dense": 2.0, "remoe relu": 4.0, "remoe topk": 4.0, "gone": 1.0})
    b = measured(tmp_path / "b.json", {"dense": 2.1, "remoe relu": 3.0, "remoe topk": 5.0}, rate=2e11, cpu="EPYC")
    assert main(["bench", "diff", a, b]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert rows["dense"][1:] == ["2.00", "2.10", "1.05", "5%", "within", "spread"]
    assert rows["remoe relu"][2:] == ["4.00", "3.00", "0.75", "5%", "faster"]
    assert rows["remoe topk"][2:] == ["4.00", "5.00", "1.25", "5%", "slower"]
    assert "cpu: Xeon before, EPYC after" in out
    assert "threads" not in out
    assert "fastest large product: 100.0 before, 200.0 GFLOP/s after (2.00 times)" in out
    assert "only in" in out
    assert "gone" in out.split("only in")[1]


def test_a_file_without_spreads_and_a_training_step(tmp_path, capsys):
    old = measured(tmp_path / "old.json", {"dense": 2.0}, spread=None)
    assert main(["bench", "diff", old, old]) == 0
    assert rows_of(capsys.readouterr().out)["dense"][1:] == ["2.00", "2.00", "1.00"]
    step = tmp_path / "step.json"
    step.write_text(json.dumps({"machine": {}, "rows": [{"name": "remoe relu", "ms_per_step": 8.0}]}))
    assert main(["bench", "diff", str(step), str(step)]) == 0
    assert "8.00" in capsys.readouterr().out
    assert main(["bench", "diff", old, str(step)]) == 2
    assert "have no measurement in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"rows": []}', '{"rows": [3]}', '{"rows": [{"milliseconds": {"a": 1}}]}',
     '{"rows": [{"name": "a", "ms_per_step": NaN}]}', '{"rows": [{"name": "a", "ms_per_step": 0}], "machine": {}}'],
)  # fmt: skip
def test_another_file_is_one_line(tmp_path, content, capsys):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert main(["bench", "diff", str(path), str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
