"""Trains a tiny model on meshes of 2 and 4 processes and compares each step with a run of one process.

    python experiments/mesh_equality.py --out experiments/results/mesh-equality.json

Every run computes the same micro-batches, several per process and step. The processes communicate by gloo on the CPU.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from remoe.lab.data import PrepareOptions, open_dataset, prepare
from remoe.lab.machine import machine
from remoe.lab.training.config import TrainConfig, config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import mesh_of
from remoe.lab.training.metrics import read_metrics
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.trainer import Trainer

STEPS = 50
ROUTERS = {"relu": {}, "topk": {"k": 2}, "sigmoid": {}, "threshold": {}}
MESHES = {2: ["replicate=2", "fsdp=2", "fsdp=2,ep=2"], 4: ["fsdp=4,ep=2", "fsdp=2,tp=2"]}
COMPARED = ("lm_loss", "loss", "reg_loss", "lambda", "sparsity", "grad_norm")
OPTIONS = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "num_experts": 4,
    "seq_len": 32,
    "batch_size": 8,
    "micro_batch_size": 1,
    "steps": STEPS,
    "device": "cpu",
    "mesh_load": "official",  # loads per micro-batch, which are the same on every mesh
    "validate": {"every": STEPS, "max_tokens": 1000},
    "checkpoint": {"every": STEPS},
}


def config(data: Path, router: str, mesh: str | None) -> TrainConfig:
    """The options of one run."""
    return config_from_dict({**OPTIONS, **ROUTERS[router], "router": router, "data": str(data), "mesh": mesh}, "here")


def train(data: Path, out: Path, router: str, mesh: str | None) -> None:
    """One run, on every rank; rank 0 writes it to a folder."""
    options = config(data, router, mesh)
    dataset, ranks, run = open_dataset(data), Ranks(mesh_of(options), "cpu"), RunFolder(out)
    trainer = Trainer(options, dataset, run, ranks)
    if ranks.first:
        run.create(options, dataset.tokenizer_path)
    trainer.train()


def rank_main(rank: int, world_size: int, data: Path, folder: Path) -> None:
    """All runs of a number of processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous-{world_size}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    for mesh in MESHES[world_size]:
        for router in ROUTERS:
            train(data, folder / f"{router} {mesh}", router, mesh)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for each other where Python takes the group apart


def differences(one: Path, several: Path) -> dict[str, float]:
    """The largest relative difference of each figure over all steps."""
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (one, several))
    assert [record["step"] for record in found] == [record["step"] for record in expected] == list(range(1, STEPS + 1))
    largest = dict.fromkeys(COMPARED, 0.0)
    for ours, record in zip(found, expected, strict=True):
        for name in COMPARED:
            difference = abs(ours[name] - record[name])
            largest[name] = max(largest[name], difference / abs(record[name]) if difference else 0.0)
    return largest


def main() -> None:
    """Runs everything and writes the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs = Path(__file__).parents[1] / "docs"
        prepared = PrepareOptions(sources=(str(docs),), out=folder / "data", vocab_size=1024, quiet=True)
        prepare(prepared)
        for router in ROUTERS:
            train(folder / "data", folder / router, router, None)
        for world_size in MESHES:
            mp.start_processes(rank_main, (world_size, folder / "data", folder), world_size, start_method="spawn")
        found = [
            {"router": router, "mesh": mesh, **differences(folder / router, folder / f"{router} {mesh}")}
            for meshes in MESHES.values()
            for mesh in meshes
            for router in ROUTERS
        ]
    result = {
        "command": "python experiments/mesh_equality.py",
        "machine": machine(torch.device("cpu")),
        "options": OPTIONS,
        "largest_relative_difference": found,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    for row in found:
        print(row["router"], row["mesh"], *(f"{name} {row[name]:.1e}" for name in COMPARED))


if __name__ == "__main__":
    main()
