"""Functions on several processes that form one group of gloo."""

import os
from datetime import timedelta

import forked
import torch
import torch.distributed as dist


def run_ranks(function, folder, *arguments, world_size=2):
    """Calls `function(rank, folder, *arguments)` on each rank, and waits; an error on one fails here.

    Args:
        function: of a module that can be imported.
        folder: an existing folder, where the ranks meet; a function leaves its results there.
        arguments: anything that can be pickled.
        world_size: number of processes.
    """
    context = forked.context()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, function, folder, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world_size


def timeouts():
    """After how many seconds the collectives of each group fail to which this process and another one belong."""
    groups = [group for group in dist.distributed_c10d._world.pg_map if group.size() > 1]
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def _rank(rank, world_size, function, folder, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # as torchrun sets them; the ranks meet in a file
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=600)}  # as --mesh-timeout's default
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
    function(rank, folder, *arguments)
    dist.barrier()
    os._exit(0)  # gloo's threads may wait forever for each other where Python takes the group apart
