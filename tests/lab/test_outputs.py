"""An option that names a file to write overwrites nothing of another kind, whatever the command."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from remoe.errors import ConfigError
from remoe.lab.cli.main import main
from remoe.lab.outputs import check_output, is_report, json_with, write_output

PAGE = b'<!doctype html>\n<html lang="en">\n<head>\n<title>Routing of x</title>'
FIGURES = json.dumps({"checkpoint": "x", "all": {}}).encode()
BENCH = json.dumps({"machine": {}, "rows": []}).encode()
COMMANDS = {
    "report": (["report", "nowhere", "--out"], PAGE),
    "eval": (["eval", "nowhere", "--json"], FIGURES),
    "layer": (["bench", "layer", "--repetitions", "1", "--device", "cuda:99", "--out"], BENCH),
    "decode": (["bench", "decode", "--repetitions", "1", "--device", "cuda:99", "--out"], BENCH),
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A run with a checkpoint, a dataset, a model, and files of a user's own."""
    contents = {
        "run": ["config.yaml", "metrics.jsonl", "sample.txt", "tokenizer/tokenizer.json", "tensorboard/events"],
        "run/checkpoints/step-00000002": ["config.json", "model.safetensors", "training.json"],
        "data": ["dataset.json", "preparation.json", "train-00000.safetensors", "tokenizer/tokenizer.json"],
        "model": ["config.json", "model.safetensors", "README.md", "tokenizer.json", "modeling_remoe.py"],
        "own": ["notes.md", "page.html", "thesis.tex", "list.json"],
    }
    for folder, names in contents.items():
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[1, 2]" if path.suffix == ".json" else "<!doctype html>mine")
    (tmp_path / "own" / "link").symlink_to(tmp_path / "run" / "config.yaml")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_no_file_of_another_kind_is_overwritten(work, capsys, command):
    argv, _ = COMMANDS[command]
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    for path in before:
        assert main([*argv, str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["summary.json", "checkpoints/new.json", "checkpoints/step-00000002/training.json"])
def test_nothing_is_put_where_a_run_keeps_its_own(work, capsys, command, name):
    (work / "run" / name).unlink(missing_ok=True)
    assert main([*COMMANDS[command][0], str(work / "run" / name)]) == 2
    assert re.search(f"belongs to the (run|model) {work / 'run'}", capsys.readouterr().err)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_the_same_kind_may_be_replaced(work, capsys, command):
    argv, content = COMMANDS[command]
    for name in ("run/old", "own/old"):
        (work / name).write_bytes(content)
        assert main([*argv, str(work / name)]) == 2  # for another reason: there is no such run or device
        assert str(work / name) not in capsys.readouterr().err


def test_a_page_is_no_json_and_json_no_page(tmp_path):
    (tmp_path / "page").write_bytes(PAGE)
    (tmp_path / "figures").write_bytes(FIGURES)
    check_output("--out", tmp_path / "page", is_report)
    check_output("--json", tmp_path / "figures", json_with("checkpoint", "all"))
    with pytest.raises(ConfigError, match="not a file that this command writes"):
        check_output("--out", tmp_path / "figures", is_report)
    with pytest.raises(ConfigError, match="not a file that this command writes"):
        check_output("--json", tmp_path / "page", json_with("checkpoint"))


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_output(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    check_output("--out", tmp_path / "pipe", is_report)
    write_output(tmp_path / "pipe", b"y")
    assert os.read(reader, 9) == b"y"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["results.json", "results.md", "figures.md"])
def test_compare_replaces_only_the_tables_of_a_comparison(tmp_path, capsys, name):
    experiment = tmp_path / "trial.yaml"
    experiment.write_text("variants: {relu: {}}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    argv = ["compare", str(experiment), "--out", str(tmp_path / "out"), "--data", str(tmp_path / "nowhere"), "--list"]
    assert main(argv) == 2
    assert f"{tmp_path / 'out' / name} exists" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main(argv) == 2
    assert "no such dataset folder" in capsys.readouterr().err
