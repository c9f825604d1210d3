"""Counts what a rank sends, at the collectives that are called."""

from collections import Counter

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall_base_": "all-to-all",
}
WAITS = {"wait_tensor", "_wrap_tensor_autograd"}


class Traffic(TorchDispatchMode):
    """Context in which `sent` has the bytes by kind of collective, as `remoe.lab.scaling.traffic` counts them."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in WAITS:
                self.sent[KINDS[name]] += _sent(name, args)
        return func(*args, **(kwargs or {}))


def _sent(name, args):
    if name == "allgather_":  # outputs in lists, inputs
        (own,) = args[1]
        return (len(args[0][0]) - 1) * own.nbytes
    if name == "alltoall_base_":  # output, input, group, rows from each, rows for each
        group, rows = ProcessGroup.unbox(args[2]), args[4]
        return (sum(rows) - rows[group.rank()]) * args[1][:1].nbytes
    if name == "all_gather_into_tensor":
        return args[0].nbytes * (args[1] - 1)
    if name == "all_reduce":
        size = dist.distributed_c10d._resolve_process_group(args[2]).size()
        return 2 * args[0].nbytes * (size - 1) / size
    if name == "allreduce_":
        size = ProcessGroup.unbox(args[1]).size()
        return 2 * sum(t.nbytes for t in args[0]) * (size - 1) / size
    size = ProcessGroup.unbox(args[2]).size()  # output, input
    whole = args[0] if name == "_allgather_base_" else args[1]
    return whole.nbytes * (size - 1) / size
