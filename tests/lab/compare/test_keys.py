"""Runs of 0.1.0 are found by their keys, except where a preset has changed what is trained."""

import hashlib
import json

import pytest

from remoe.lab.compare.keys import key_of
from remoe.lab.training.config import config_from_dict


def key_of_0_1_0(**options):
    return hashlib.sha256(json.dumps({"preset": "tiny", "seed": 0, **options}, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"router": "topk"}, True),
        ({"router": "dense"}, True),
        ({"router": "relu"}, False),
        ({"router": "relu_norm"}, False),
        ({"router": "relu", "model": {"router_std": None}}, True),
    ],
    ids=str,
)
def test_the_start_of_tinys_routers_is_in_the_key(options, same):
    key = key_of(config_from_dict({"preset": "tiny", **options}, "test"))
    assert (key == key_of_0_1_0(router=options["router"], steps=500)) == same
