"""Routers from files of the user's own."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from remoe.errors import ConfigError
from remoe.lab.cli.main import main
from remoe.lab.export import export_run
from remoe.routing import ROUTERS, TopKRouter
from remoe.routing.options import check_options
from remoe.routing.plugins import load_own_routers

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
COMPARE = "import sys; from remoe.lab.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_compare_trains_the_router_of_the_guide(corpus, tmp_path):
    examples = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    example = next(example for example in examples if "class AboveMean" in example)
    (tmp_path / "above_mean.py").write_text(example)
    base = {"steps": 2, "seq_len": 32, "batch_size": 2, "model": {"hidden_size": 32, "num_hidden_layers": 1}}
    experiment = {"base": base, "variants": {"mine": {"router": "above_mean"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(experiment))
    command = [sys.executable, "-c", COMPARE, "compare", "mine.yaml", "--data", str(corpus), "--device", "cpu"]
    paths = os.pathsep.join(filter(None, sys.path))
    for files, code, words in (
        ("above_mean.py", 0, "validation loss"),
        ("none.py", 2, "none.py, which is not a Python"),
    ):
        environment = os.environ | {"REMOE_ROUTERS": files, "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
    assert "| mine | 1 | 2 |" in (tmp_path / "runs" / "compare" / "mine" / "results.md").read_text()


def test_options_of_types_of_ones_own_are_passed_on():
    class Sized(TopKRouter):
        def __init__(self, *shape, sizes: list[int] = (), **options):
            super().__init__(*shape, **options)
            self.sizes = sizes

    check_options("sized", Sized, {"sizes": [1, 2], "renormalize": True})
    with pytest.raises(ConfigError, match="renormalize must be true or false"):
        check_options("sized", Sized, {"renormalize": [1]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module"),
        ("def f(", "SyntaxError"),
        ("", "puts no router"),
    ],
)
def test_a_file_that_does_not_work_is_named(text, words, tmp_path):
    path = tmp_path / "statistics.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_own_routers(str(path))
    assert "fmean" in dir(importlib.import_module("statistics"))  # no module of another is replaced
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_own_routers(str(tmp_path))


def test_a_router_of_ones_own_is_not_exported(monkeypatch, corpus, tmp_path):
    monkeypatch.setitem(ROUTERS, "mine", type("Mine", (TopKRouter,), {"__module__": "mine"}))
    small = ["--steps", "1", "--seq-len", "32", "--batch-size", "1", "--model.hidden-size", "32"]
    run = ["--out", str(tmp_path / "run"), "--data", str(corpus), "--router", "mine"]
    assert main(["train", *run, *small, "--model.num-hidden-layers", "1"]) == 0
    with pytest.raises(ConfigError, match="router 'mine' is not of this package"):
        export_run(tmp_path / "run", tmp_path / "exported")
