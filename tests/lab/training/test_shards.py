"""The tensors of a checkpoint, written in blocks by several ranks and read in other ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from remoe.errors import CheckpointError
from remoe.lab.training.shards import INDEX, MODEL, TRAINING, file_of, index_of, key_of, model_files, opened, owners

MATRIX = torch.arange(5 * 6.0).view(5, 6)
TENSORS = {"matrix": MATRIX, "number": torch.tensor(7), "none": torch.empty(0, 3)}
TOP, LEFT, RIGHT = ((0, 2), (0, 6)), ((2, 5), (0, 3)), ((2, 5), (3, 6))
HELD = [  # by rank; the third holds what the first does
    {"matrix": [TOP], "number": [()], "none": []},
    {"matrix": [LEFT, RIGHT], "number": [()], "none": []},
    {"matrix": [TOP], "number": [()], "none": []},
]


@pytest.fixture
def checkpoint(tmp_path):
    owner = owners(HELD)
    for rank in range(3):
        parts = {
            key_of(name, block): TENSORS[name][tuple(slice(*ends) for ends in block)].clone()
            for name, of_name in owner.items()
            for block, found in of_name.items()
            if found == rank
        }
        save_file(parts, tmp_path / file_of(rank, 3))
    (tmp_path / INDEX).write_text(json.dumps({MODEL: index_of(TENSORS, owner, 3), TRAINING: {}}))
    return tmp_path


def test_each_block_is_written_once_by_the_rank_with_the_least_to_write():
    owner = owners(HELD)
    assert owner["matrix"] == {TOP: 0, LEFT: 1, RIGHT: 1}
    assert owner["number"] == {(): 2}


@pytest.mark.parametrize(
    "rows", [slice(None), slice(0, 2), slice(1, 4), slice(2, 5), slice(4, 5), slice(3, 3)], ids=str
)
@pytest.mark.parametrize("columns", [slice(None), slice(2, 4), slice(3, 6)], ids=str)
def test_any_part_is_read_from_the_blocks_that_hold_it(checkpoint, rows, columns):
    with opened(checkpoint) as (model, _):
        found = model["matrix"][rows, columns]
    assert torch.equal(found, MATRIX[rows, columns])


def test_tensors_without_dimensions_or_numbers(checkpoint):
    with opened(checkpoint) as (model, _):
        assert all(torch.equal(model[name][...], tensor) for name, tensor in TENSORS.items())
        assert all(model[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_a_block_that_the_index_does_not_list_is_missed(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    index[MODEL]["matrix"]["blocks"].pop()
    (checkpoint / INDEX).write_text(json.dumps(index))
    with opened(checkpoint) as (model, _):
        assert torch.equal(model["matrix"][:2, :], MATRIX[:2])
        with pytest.raises(ValueError, match="blocks are missing"):
            model["matrix"][...]


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 1, "training": {}}', '{"model": {"a": {}}, "training": {}}'])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"shards\.json is damaged"):
        model_files(tmp_path)
