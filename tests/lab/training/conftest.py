"""A run that nothing happened to."""

from pathlib import Path

import pytest
from whole_run import train


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(corpus, out) == 0
    return out
