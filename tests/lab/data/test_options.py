"""Options are checked when they are made, and cheap to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from remoe.errors import ConfigError
from remoe.lab.data import PrepareOptions


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": ()},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"vocab_size": 256},
        {"vocab_size": 10**12},
        {"tokenizer_sample_mb": 0.0},
        {"shard_tokens": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_work(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ConfigError):
        PrepareOptions(out=tmp_path, **changes)


def test_options_load_without_heavy_libraries() -> None:
    code = (
        "import sys; from remoe.lab.data import Document, PrepareOptions;"
        "print({'torch', 'transformers', 'tokenizers', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
