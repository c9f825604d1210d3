"""50 steps on meshes of two and four processes are those of one process, with two micro-batches in each.

`experiments/mesh_equality.py` does the same on more meshes, and in float64.
"""

import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks

from remoe.lab.data import open_dataset
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import Mesh, mesh_of
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.trainer import Trainer

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")]

STEPS = 50
OPTIONS = {"relu": {"sparsity": {"lambda_init": 1e-3}}, "topk": {"k": 2}, "sigmoid": {}, "threshold": {}}
MESHES = ["replicate=2", "fsdp=2", "fsdp=2,ep=2", "fsdp=4,ep=2", "fsdp=2,tp=2"]
BATCH = 8


def sequences(mesh, router):
    """Micro-batch of the run on one process: as large as all of the mesh, but `threshold` ranks the tokens of each."""
    parts = Mesh.parse(mesh).parts
    return BATCH // 2 // parts if router == "threshold" else BATCH // 2


def course(data, router, micro_batch_size, mesh=None):
    """The records of the steps of one rank."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"model": sizes, "seq_len": 8, "batch_size": BATCH, "micro_batch_size": micro_batch_size}
    values |= {"num_experts": 4, "steps": STEPS, "device": "cpu", "router": router, "data": str(data), "mesh": mesh}
    config = config_from_dict(values | OPTIONS[router], "test")
    trainer = Trainer(config, open_dataset(data), RunFolder("none"), Ranks(mesh_of(config), "cpu"))
    progress = ProgressLine(config, 0)
    return [trainer._train_step(progress) for _ in range(STEPS)]


def _on_ranks(rank, folder, data, mesh):
    for router in OPTIONS:
        found = course(data, router, BATCH // 2 // Mesh.parse(mesh).parts, mesh)
        torch.save(found, folder / f"{router} {rank}.pt")


def check_equal(ours, expected, where):
    for name in ("lm_loss", "loss", "reg_loss", "grad_norm"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), (*where, name)
    for name in ("lambda", "sparsity", "load_per_expert"):
        assert ours[name] == expected[name], (*where, name)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_step_is_that_of_one_process(corpus, tmp_path, mesh):
    processes = Mesh.parse(mesh).processes
    run_ranks(_on_ranks, tmp_path, corpus, mesh, world_size=processes)
    for router in OPTIONS:
        first, *others = (torch.load(tmp_path / f"{router} {rank}.pt") for rank in range(processes))
        expected = course(corpus, router, sequences(mesh, router))
        assert len(first) == len(expected) == STEPS
        for step in range(STEPS):
            check_equal(first[step], expected[step], (router, step))
            for other in others:
                for name in ("lm_loss", "reg_loss", "lambda", "sparsity", "load_per_expert"):
                    assert other[step][name] == first[step][name], (router, step, name)
