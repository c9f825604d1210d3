"""Measures what a mesh costs on gloo processes of this machine: memory of the dense stage, and time of a step.

    python experiments/mesh_costs.py memory WORK --processes 2 --out experiments/results/mesh-costs.json
    python experiments/mesh_costs.py speed WORK --processes 2 --out experiments/results/mesh-costs.json

`memory`: every token goes to every expert, and a process receives all rows in one round, or few at a time. The peak is
what one training step allocates, with the weights and moments, beside what `remoe plan` calculates. `speed`: the time
of a step of the same batch on several meshes, in turns, and the share of it in the exchange of tokens. WORK keeps the
data. Each call replaces its own entry of the result.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mesh_equality import write_data

from remoe.experts.exchange import RECEIVE_ROWS, exchange_experts
from remoe.lab.bench.timing import peak_bytes
from remoe.lab.data import open_dataset
from remoe.lab.machine import machine
from remoe.lab.scaling import memory, traffic
from remoe.lab.scaling.shards import Job
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import mesh_of
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.trainer import Trainer
from remoe.models import sharding
from remoe.models.plan import sizes_of
from remoe.models.sharding import local

WIDTHS = {"memory": 64, "speed": 128}
OPTIONS = {
    "num_experts": 8,
    "seq_len": 256,
    "micro_batch_size": 4,
    "steps": 1000,
    "device": "cpu",
    "mesh_load": "official",
}
DENSE_STAGE = {"router": "relu", "router_options": {"bias": True}, "k": 1}
SPEED = {"router": "topk", "k": 2}
BUDGETS = (RECEIVE_ROWS, 4096, 1024)
MESHES = {2: ("replicate=2", "fsdp=2", "fsdp=2,ep=2"), 4: ("replicate=4", "fsdp=4", "fsdp=4,ep=2")}
BATCH = {"memory": 4, "speed": 4}  # sequences of a process and step
ROUNDS = 6


def trainer_of(what: str, work: Path, mesh: str, options: dict) -> Trainer:
    """A trainer on every rank; nothing is written."""
    model = {"hidden_size": WIDTHS[what], "num_hidden_layers": 4, "num_attention_heads": 4}
    batch = {"batch_size": BATCH[what] * int(os.environ["WORLD_SIZE"])}
    config = config_from_dict(
        {**OPTIONS, **batch, **options, "model": model, "data": str(work / "data"), "mesh": mesh}, "here"
    )
    return Trainer(config, open_dataset(work / "data"), RunFolder(work / "run"), Ranks(mesh_of(config), "cpu"))


def dense_stage_memory(work: Path, mesh: str, budget: int) -> dict[str, object]:
    """The peak of a process in a step in which all pairs are routed, and the planned one, in bytes."""
    sharding.exchange_experts = partial(exchange_experts, receive_rows=budget)
    memory.RECEIVE_ROWS = traffic.RECEIVE_ROWS = budget
    trainer = trainer_of("memory", work, mesh, DENSE_STAGE)
    for layer in trainer.model.model.layers:
        local(layer.mlp.router.bias.data).fill_(10.0)  # opens every gate
    step = partial(trainer._train_step, ProgressLine(trainer.config, 0))
    sparsity = step()["sparsity"]
    trainer.optimizer.zero_grad(set_to_none=True)
    kept = [local(parameter) for parameter in trainer.model.parameters()]
    kept += [local(value) for state in trainer.optimizer.state.values() for value in state.values()]
    gc.collect()  # what is freed during a measurement makes it larger than it is
    peak = min(peak_bytes(step, torch.device("cpu")) for _ in range(2))
    c, meshed = trainer.config, trainer.ranks.mesh
    job = Job(sizes_of(trainer.model.config), meshed, c.seq_len, c.batch_size, c.micro_batch_size, global_load=False)
    tokens = c.micro_batch_size * c.seq_len
    return {
        "rows_at_a_time": budget,
        "rows_of_a_layer": tokens * trainer.shape.num_experts,
        "sparsity": sparsity,
        "measured_bytes": peak + sum(tensor.untyped_storage().nbytes() for tensor in kept),
        "planned_bytes": memory.rank_memory(job, 1 - sparsity).peak,
    }


def speed(work: Path) -> dict[str, object]:
    """Seconds of a step and the share of the exchange, for each mesh: medians over rounds in which all take turns."""
    meshes = MESHES[dist.get_world_size()]
    trainers = {mesh: trainer_of("speed", work, mesh, SPEED) for mesh in meshes}
    seconds, shares = ({mesh: [] for mesh in meshes} for _ in range(2))
    for number in range(ROUNDS + 1):
        for mesh, trainer in trainers.items():
            trainer.ranks.wait()
            start = time.perf_counter()
            record = trainer._train_step(ProgressLine(trainer.config, 0))
            trainer.ranks.wait()
            if number:  # the first step also allocates
                seconds[mesh].append(time.perf_counter() - start)
                shares[mesh].append(record.get("exchange_share", 0.0))
    plain = statistics.median(seconds[meshes[0]])
    return {
        mesh: {
            "seconds": statistics.median(seconds[mesh]),
            "fastest": min(seconds[mesh]),
            "slowest": max(seconds[mesh]),
            "over_replication": statistics.median(seconds[mesh]) / plain,
            "exchange_share": statistics.median(shares[mesh]),
        }
        for mesh in meshes
    }


def rank_main(rank: int, world_size: int, what: str, work: Path) -> None:
    """One process of a measurement; the first writes what it has found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    where = f"file://{work}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    if what == "speed":
        found: object = speed(work)
    else:
        mesh = f"fsdp={world_size},ep={world_size}"
        found = [{"mesh": mesh} | dense_stage_memory(work, mesh, budget) for budget in BUDGETS]
    if rank == 0:
        (work / "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for each other where Python takes the group apart


def main() -> None:
    """Measures, and writes the result into the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=WIDTHS)
    parser.add_argument("work", type=Path, help="a folder that keeps the data")
    parser.add_argument("--processes", type=int, default=2, choices=MESHES)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    work = options.work.resolve()
    if not (work / "data").exists():
        write_data(work)
    (work / "rendezvous").unlink(missing_ok=True)
    arguments = (options.processes, options.what, work)
    mp.start_processes(rank_main, arguments, options.processes, start_method="spawn")
    found = json.loads((work / "found.json").read_text())
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results[f"{options.what}, {options.processes} processes"] = {
        "command": " ".join(["python", "experiments/mesh_costs.py", options.what, "WORK", "--processes"])
        + f" {options.processes}",
        "machine": machine(torch.device("cpu")) | {"threads": 1},
        "found": found,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
