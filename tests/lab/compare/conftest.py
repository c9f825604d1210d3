"""A comparison of four systems, and a pool for it."""

import pytest
from finished_run import EXPERIMENT

from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.pool import Pool


@pytest.fixture
def pool(tmp_path):
    return Pool(tmp_path, "fingerprint")


@pytest.fixture
def trial():
    return experiment_from_dict(EXPERIMENT, "trial", "trial.yaml")
