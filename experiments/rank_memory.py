"""The peak resident memory of each process while a model is built on several, for docs/distributed.md. Linux only.

    torchrun --nproc-per-node 2 experiments/rank_memory.py --whole   # each process builds the whole model first
    torchrun --nproc-per-node 2 experiments/rank_memory.py           # as `remoe train --mesh` does

Prints, for each rank, the peak above the memory before, in MB, and the seconds. The model has 161 million parameters.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch

from remoe.lab.training.mesh import Mesh
from remoe.lab.training.ranks import Ranks
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.deferred import Deferred, allocate
from remoe.models.modeling_remoe import RemoeForCausalLM

MODEL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_experts": 8}
MODEL |= {"num_attention_heads": 8}


def build(ranks: Ranks, *, whole: bool) -> RemoeForCausalLM:
    """The model, spread over the ranks."""
    torch.manual_seed(0)
    if whole:
        model = RemoeForCausalLM(RemoeConfig(**MODEL))
        ranks.shard(model)
        return model
    with Deferred() as deferred:
        model = RemoeForCausalLM(RemoeConfig(**MODEL))
    deferred.remember(model)
    ranks.shard(model)
    allocate(model, ranks.device)
    deferred.fill(model)
    return model


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def main() -> None:
    """Builds and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--whole", action="store_true")
    whole = parser.parse_args().whole
    torch.set_num_threads(1)
    ranks = Ranks(Mesh(fsdp=int(os.environ["WORLD_SIZE"])), "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    model = build(ranks, whole=whole)
    figures = {
        "rank": ranks.rank,
        "model": sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6,
        "peak": resident("VmHWM") - before,
        "after": resident("VmRSS") - before,
        "seconds": time.perf_counter() - start,
    }
    lines = ranks.gather(json.dumps({name: round(value, 1) for name, value in figures.items()}))
    if ranks.first:
        print("\n".join(lines))
    ranks.leave()


if __name__ == "__main__":
    main()
