"""Files of a run that are damaged, or that a user wrote badly: one line that names the file, and exit code 2."""

import json
import shutil

import pytest
from tiny_run import FLAGS

from remoe.lab.cli.main import main

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), "--steps", "4", *FLAGS]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def last_line(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\n{}\n", DEEP.encode() + b"\n{}\n", b'{"step": "1"}\n{}\n', b'{"step": 1.5}\n{}\n']
)
def test_metrics(run, capsys, content):
    (run / "metrics.jsonl").write_bytes(content)
    assert main(["report", str(run), "--max-tokens", "500"]) == 2
    assert f"{run / 'metrics.jsonl'}, line 1: not " in last_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["[]", '{"steps": 4}', DEEP])
def test_a_summary_that_is_none_is_written_again(run, capsys, content):
    whole = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(content)
    assert main(["report", str(run), "--max-tokens", "500"]) == 0
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    found = json.loads((run / "summary.json").read_text())
    assert found.keys() == whole.keys()
    assert found["validation"] == whole["validation"]


@pytest.mark.parametrize("content", ['{"step": 6.5}', '{"step": "6"}', "{}", "[6]", DEEP, "\0"])
def test_the_step_of_a_checkpoint(run, capsys, content):
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "training.json").write_text(content)
        (checkpoint / "checksums.json").unlink()
    assert main(["report", str(run)]) == 2
    assert "remoe: error: " in last_line(capsys)


@pytest.mark.parametrize("content", [DEEP, "out: [", "\0", "steps: 1\nsteps: 2"])
def test_options(tmp_path, capsys, content):
    (tmp_path / "options.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "options.yaml")]) == 2
    assert f"cannot read configuration {tmp_path / 'options.yaml'}" in last_line(capsys)


def test_a_router_file_that_ends_python(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.setenv("REMOE_ROUTERS", str(tmp_path / "mine.py"))
    assert main(["plan", "tiny"]) == 2
    assert last_line(capsys) == f"remoe: error: REMOE_ROUTERS: {tmp_path / 'mine.py'}: SystemExit: 0"


def test_a_tracker_of_megatron_that_is_no_text(tmp_path, capsys):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe7")
    assert main(["convert", "megatron", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "latest_checkpointed_iteration.txt names no iteration but" in last_line(capsys)
