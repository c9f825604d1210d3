"""Stages of training on hand-made courses of S."""

import pytest

from remoe.stages import first_sparse_step, settling_time, stage


def test_settling_time_on_hand_made_courses():
    dense, settled, off = [0.5] * 30, [0.875 + 0.009 * (-1) ** i for i in range(50)], [0.86]
    assert settling_time(dense + settled, 0.875) == 30
    assert settling_time(dense + settled[:49], 0.875) is None
    assert settling_time(dense + settled[:49] + off + settled, 0.875) == 80
    assert settling_time(settled + off * 100, 0.875) == 0
    assert settling_time([], 0.875) is None
    closed, near = [1.0] * 60, [1 - 1.07 / 128] * 50
    assert settling_time(closed + near, 1 - 1 / 128) == 60  # not while every expert is off


@pytest.mark.parametrize(
    ("sparsity", "target", "expected"),
    [
        (0.5, 0.875, "dense"),
        (0.3, 0.875, "dense"),
        (0.7, 0.875, "sparsifying"),
        (0.82, 0.875, "sparse"),
        (0.95, 0.875, "sparse"),
        (0.95, 0.984375, "sparsifying"),
        (0.98, 0.984375, "sparse"),
        (0.0, 0.0, "dense"),
    ],
)
def test_stage(sparsity, target, expected):
    assert stage(sparsity, target) == expected


def test_stage_three_begins_where_it_lasts():
    dense, sparse = [0.5], [0.875]
    assert first_sparse_step(sparse * 10, 0.875) == 1
    assert first_sparse_step(dense * 3 + sparse * 5 + dense * 2 + sparse * 12, 0.875) == 11
    assert first_sparse_step(dense * 3 + sparse * 2, 0.875) == 4
    assert first_sparse_step(sparse * 9 + dense, 0.875) == 11
