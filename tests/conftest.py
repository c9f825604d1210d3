"""Shared by all tests: no network, fixed seeds, one small corpus."""

import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test asks for more, they do not wait in a loop
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import functools

import forked
import pytest

# As in a terminal, even if the tests run in the background or under nohup: commands inherit what is ignored here.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection(session):
    """Before the tests are collected, by processes that do: those that only start others need not import torch."""
    if session.config.getoption("numprocesses", None):
        return
    from tyro import _docstrings

    from remoe.lab.training import train

    train.SAMPLE_TOKENS = 12  # the text at its end would take longer than a tiny run
    # tyro reads the source of the options' classes anew at each call; a process has one call, and the tests a thousand.
    _docstrings._ClassTokenization.make = staticmethod(functools.cache(_docstrings._ClassTokenization.make))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def forked_runs(monkeypatch):
    """`remoe compare` in this process starts its runs by the server of the tests, which is running already."""
    monkeypatch.setattr("remoe.lab.compare.runner.Starter", forked.Shared)


@pytest.fixture
def no_figures(monkeypatch):
    """`remoe compare` in this process writes its tables alone."""
    monkeypatch.setattr("remoe.lab.compare.output.draw", forked.no_figures)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Prepared data for training: two domains of made-up, regular text."""
    from remoe.lab.data import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("corpus")
    for domain, words in {"farm": "cow sheep hen goat barn", "town": "road shop bus tram lamp"}.items():
        names = words.split()
        (root / "text" / domain).mkdir(parents=True)
        for i in range(30):
            text = " ".join(f"{names[(i + j) % 5]} {i * j % 7}." for j in range(60))
            (root / "text" / domain / f"{i}.txt").write_text(text)
    return prepare(
        PrepareOptions(
            sources=(str(root / "text"),),
            out=root / "data",
            vocab_size=300,
            validation_fraction=0.1,
            quiet=True,
        )
    )
