"""Routers from files of the user's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from remoe.errors import ConfigError
from remoe.routing.own import VARIABLE, load_own_routers

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
COMPARE = "import sys; from remoe.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_compare_trains_the_router_of_the_guide(corpus, tmp_path):
    examples = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    example = next(example for example in examples if "class AboveMean" in example)
    (tmp_path / "above_mean.py").write_text(example.split("layer = ")[0])  # the router alone
    base = {"steps": 2, "seq_len": 32, "batch_size": 2, "model": {"hidden_size": 32, "num_hidden_layers": 1}}
    experiment = {"base": base, "variants": {"mine": {"router": "above_mean"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(experiment))
    command = [sys.executable, "-c", COMPARE, "compare", "mine.yaml", "--data", str(corpus), "--device", "cpu"]
    paths = os.pathsep.join(filter(None, sys.path))
    for files, code, words in (
        ("above_mean.py", 0, "validation loss"),
        ("none.py", 2, "none.py, which is not a Python"),
    ):
        environment = os.environ | {VARIABLE: files, "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
    assert "| mine | 1 | 2 |" in (tmp_path / "runs" / "compare" / "mine" / "results.md").read_text()


def test_a_file_that_is_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_own_routers()
