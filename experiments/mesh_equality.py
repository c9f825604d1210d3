"""Trains a tiny model on meshes of 2 and 4 processes and compares each step with a run of one process.

    python experiments/mesh_equality.py WORK --out experiments/results/mesh-equality.json

Every run computes the same micro-batches, several per process and step, in float32 and again in float64. Rounding can
make a token choose another expert where two logits are nearly equal; in float64 it is too small for that. The control
is one process that computes the micro-batches of each step in another order, so that only the order in which gradients
are summed differs. The processes communicate by gloo on the CPU. Runs that are finished stay in WORK; the same command
goes on with the others.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from itertools import accumulate, product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaRMSNorm

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
MESHES = {
    2: ["replicate=2", "fsdp=2", "fsdp=2,ep=2", "tp=2"],
    4: ["replicate=2,fsdp=2,ep=2", "fsdp=4,ep=2", "fsdp=2,tp=2", "fsdp=2,ep=2,tp=2", "fsdp=2,ep=4,tp=2"],
}
# Where no two processes share an expert, FSDP2 of torch 2.13 divides its gradient twice unless float32 or bfloat16.
ONLY_FLOAT32 = ("fsdp=2,ep=2", "replicate=2,fsdp=2,ep=2", "fsdp=2,ep=4,tp=2")
DTYPES = ("float32", "float64")
ORDERS = [f"order {number}" for number in range(1, 9)]  # of the micro-batches in the controls
CONTROLS = [("threshold", order, "float32") for order in ORDERS]  # the router whose differences are the largest
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


class ReorderedTrainer(Trainer):
    """A trainer that computes the rows of each batch, which are micro-batches here, in another order."""

    order = 0

    def _batch(self):
        input_BS, target_BS, items = super()._batch()
        order = torch.randperm(len(input_BS), generator=torch.Generator().manual_seed(self.order * STEPS + self.step))
        return input_BS[order], target_BS[order], items


class Float64Trainer(Trainer):
    """A trainer whose weights and activations are float64; lambda stays float32."""

    def _build(self):
        LlamaRMSNorm.forward = _norm
        model = super()._build().double()
        if self.ranks.mesh.tp > 1:  # then the loss is transformers', which rounds to float32
            model.loss_function = _loss
        return model


def _norm(module: LlamaRMSNorm, x: Tensor) -> Tensor:
    """As transformers', which rounds to float32."""
    return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))


def _loss(logits: Tensor, labels: None, vocab_size: int, num_items_in_batch: int, shift_labels: Tensor) -> Tensor:
    """As transformers', which rounds to float32."""
    return cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum") / num_items_in_batch


TRAINERS: dict[str, Callable[..., Trainer]] = {"float32": Trainer, "float64": Float64Trainer}


def folder_of(work: Path, router: str, mesh: str | None, dtype: str) -> Path:
    """Where a run is."""
    return work / f"{router} {mesh or 'alone'} {dtype}"


def finished(folder: Path) -> bool:
    """Whether a run has all its steps."""
    return (folder / "finished").exists()


def config(data: Path, router: str, mesh: str | None) -> TrainConfig:
    """The options of one run."""
    options = {**OPTIONS, **ROUTERS[router], "router": router}
    return config_from_dict({**options, "data": str(data), "mesh": mesh}, "here")


def train(work: Path, router: str, mesh: str | None, dtype: str) -> None:
    """One run, on every rank; rank 0 writes it to a folder."""
    options = config(work / "data", router, None if mesh in ORDERS else mesh)
    out = folder_of(work, router, mesh, dtype)
    dataset, ranks = open_dataset(work / "data"), Ranks(mesh_of(options), "cpu")
    norm = LlamaRMSNorm.forward
    trainer = (ReorderedTrainer if mesh in ORDERS else TRAINERS[dtype])(options, dataset, RunFolder(out), ranks)
    if isinstance(trainer, ReorderedTrainer):
        trainer.order = ORDERS.index(mesh)
    if ranks.first:
        shutil.rmtree(out, ignore_errors=True)
        trainer.run.create(options, dataset.tokenizer_path)
    trainer.train()
    LlamaRMSNorm.forward = norm
    if trainer.step < STEPS:
        raise SystemExit("stopped by a signal; the same command goes on")
    if ranks.first:
        (out / "finished").touch()


def rank_main(rank: int, world_size: int, work: Path, runs: list[tuple[str, str, str]]) -> None:
    """All runs of a number of processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    where = f"file://{work}/rendezvous-{world_size}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    for run in runs:
        train(work, *run)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for each other where Python takes the group apart


def write_data(work: Path) -> None:
    """Text of random words, the same on every machine; frequent words are as much more frequent as in language."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(1, 8))) for _ in range(2000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    (work / "text").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        text = " ".join(chance.choices(words, cum_weights=weights, k=1000))
        (work / "text" / f"{number:02d}.txt").write_text(text)
    prepare(PrepareOptions(sources=(str(work / "text"),), out=work / "data", vocab_size=1024, quiet=True))


def difference(one: Path, several: Path) -> dict[str, object]:
    """The largest relative difference of each figure over all steps, and where the routing differs first.

    `first_step_with_another_load` is the first step in which a layer routes another number of tokens to an expert;
    `lm_loss_before` is the largest difference of the loss before it.
    """
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (one, several))
    assert [record["step"] for record in found] == [record["step"] for record in expected] == list(range(1, STEPS + 1))
    largest: dict[str, object] = {}
    of_step: dict[str, list[float]] = {name: [] for name in COMPARED}
    for ours, record in zip(found, expected, strict=True):
        for name in COMPARED:
            apart = abs(ours[name] - record[name])
            of_step[name].append(apart / abs(record[name]) if apart else 0.0)
    first = next(
        (step for step in range(STEPS) if found[step]["load_per_expert"] != expected[step]["load_per_expert"]), None
    )
    largest = {name: max(values) for name, values in of_step.items()}
    largest["first_step_with_another_load"] = None if first is None else first + 1
    largest["lm_loss_before"] = max(of_step["lm_loss"][:first], default=0.0)
    return largest


def runs_on(meshes: list[str]) -> list[tuple[str, str, str]]:
    """(router, mesh, dtype) of each run on some meshes."""
    every = product(ROUTERS, meshes, DTYPES)
    return [run for run in every if run[2] == "float32" or run[1] not in ONLY_FLOAT32]


def main() -> None:
    """Runs what is not finished and writes the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="a folder that keeps the runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--meshes", nargs="*", default=[mesh for meshes in MESHES.values() for mesh in meshes])
    parser.add_argument("--report", action="store_true", help="run nothing: write what the finished runs give")
    options = parser.parse_args()
    work = options.work.resolve()
    if not options.report:
        run_all(work, options.meshes)
    chosen = runs_on(options.meshes) + CONTROLS
    done = [run for run in chosen if finished(folder_of(work, *run))]
    found = [
        {"router": router, "mesh": mesh, "dtype": dtype}
        | difference(folder_of(work, router, None, dtype), folder_of(work, router, mesh, dtype))
        for router, mesh, dtype in done
    ]
    result = {
        "command": "python experiments/mesh_equality.py WORK",
        "machine": machine(torch.device("cpu")) | {"threads": 1},
        "options": OPTIONS,
        "not_run": [" ".join(run) for run in chosen if run not in done],
        "largest_relative_difference": found,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in found:
        print(*row.values())


def run_all(work: Path, chosen: list[str]) -> None:
    """Makes the data and all runs that are not finished."""
    torch.set_num_threads(1)
    if not (work / "data").exists():
        write_data(work)
    for run in [*product(ROUTERS, [None], DTYPES), *CONTROLS]:
        if not finished(folder_of(work, *run)):
            train(work, *run)
    for world_size, meshes in MESHES.items():
        runs = runs_on([mesh for mesh in meshes if mesh in chosen])
        runs = [run for run in runs if not finished(folder_of(work, *run))]
        if runs:
            (work / f"rendezvous-{world_size}").unlink(missing_ok=True)
            mp.start_processes(rank_main, (world_size, work, runs), world_size, start_method="spawn")


if __name__ == "__main__":
    main()
