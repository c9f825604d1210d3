"""Bytes and memory that `remoe plan --mesh` calculates are those of a training step on 2 and 4 processes."""

import gc
import statistics
from functools import partial

import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks
from traffic import Traffic

from remoe.experts.cpu.build import compiled_kernels
from remoe.lab.bench.timing import peak_bytes
from remoe.lab.data import open_dataset
from remoe.lab.scaling.memory import rank_memory
from remoe.lab.scaling.shards import Job
from remoe.lab.scaling.traffic import per_kind, traffic
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import mesh_of
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.trainer import Trainer
from remoe.models.plan import sizes_of
from remoe.models.sharding import local

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")]

EVEN = {"router": "topk", "k": 4}  # all pairs of the 4 experts, so every rank sends equally many
TRAFFIC = {
    2: {
        "fsdp=2": {"num_experts": 3, "recompute": True},  # an odd number is padded
        "fsdp=2,ep=2": {**EVEN, "recompute": True, "dtype": "bfloat16"},
        "replicate=2": {"router": "dense"},
        "tp=2": {"dtype": "bfloat16", "recompute": True},
    },
    4: {
        "fsdp=4,ep=2": EVEN,
        "replicate=2,fsdp=2": {"router": "sigmoid"},
        "fsdp=2,tp=2": {**EVEN, "mesh_load": "official"},
        "fsdp=2,ep=4,tp=2": {**EVEN, "recompute": True},
    },
}
# A router that does not learn: the sparsity of a measured step is that of the planned one.
LARGE = {"seq_len": 128, "batch_size": 4, "router": "topk", "k": 2, "optim": {"lr": 1e-12}}
LARGE["model"] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
DENSE_STAGE = {"router": "relu", "k": 1}  # more than half of the experts are active at the start
MEMORY = {
    2: {"fsdp=2": LARGE, "fsdp=2,ep=2": {**LARGE, **DENSE_STAGE}, "tp=2": {**LARGE, "recompute": True}},
    4: {"fsdp=4,ep=2": LARGE},
}


def trainer_of(folder, data, mesh, options):
    model = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | options.get("model", {})
    common = {"seq_len": 16, "batch_size": 8, "micro_batch_size": 2, "num_experts": 4, "steps": 3, "device": "cpu"}
    config = config_from_dict({**common, "data": str(data), "mesh": mesh, **options, "model": model}, "test")
    return Trainer(config, open_dataset(data), RunFolder(folder / "run"), Ranks(mesh_of(config), "cpu"))


def job_of(trainer):
    c, mesh = trainer.config, trainer.ranks.mesh
    micro = min(c.micro_batch_size, c.batch_size // mesh.parts)
    options = {"bfloat16": c.dtype == "bfloat16", "recompute": c.recompute, "global_load": c.mesh_load == "global"}
    options["kernels"] = compiled_kernels(torch.float32) is not None
    return Job(sizes_of(trainer.model.config), mesh, c.seq_len, c.batch_size, micro, **options)


def _measure(rank, folder, data, world_size):
    sent, held = {}, {}
    for mesh, options in TRAFFIC[world_size].items():
        trainer = trainer_of(folder, data, mesh, options)
        with Traffic() as counted:
            record = trainer._train_step(ProgressLine(trainer.config, 0))
        planned = per_kind(traffic(job_of(trainer), 1 - record["sparsity"]))
        sent[mesh] = dict(counted.sent), planned
    for mesh, options in MEMORY[world_size].items():
        trainer = trainer_of(folder, data, mesh, options)
        progress = ProgressLine(trainer.config, 0)
        density = 1 - trainer._train_step(progress)["sparsity"]
        trainer.optimizer.zero_grad(set_to_none=True)
        kept = [local(parameter) for parameter in trainer.model.parameters()]
        kept += [local(value) for state in trainer.optimizer.state.values() for value in state.values()]
        # Memory of before that is freed during a measurement makes it larger than it is.
        gc.collect()
        step = partial(trainer._train_step, progress)
        peak = min(peak_bytes(step, torch.device("cpu")) for _ in range(3))
        measured = peak + sum(tensor.untyped_storage().nbytes() for tensor in kept)
        held[mesh] = measured, rank_memory(job_of(trainer), density).peak
    torch.save((sent, held), folder / f"{rank}.pt")


@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_of_a_step_and_memory_of_a_process_are_planned(corpus, tmp_path, processes):
    run_ranks(_measure, tmp_path, corpus, processes, world_size=processes)
    measured = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for sent, _ in measured:
        for mesh, (counted, planned) in sent.items():
            assert counted == pytest.approx(planned, rel=1e-9), mesh  # the density is a float32
    # The plan is of equally many pairs for each expert, and a process has more or fewer: their mean is the plan's.
    for mesh, (_, planned) in measured[0][1].items():
        found = statistics.mean(held[mesh][0] for _, held in measured)
        assert planned == pytest.approx(found, rel=0.1), mesh
