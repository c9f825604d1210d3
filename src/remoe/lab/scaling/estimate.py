"""Time of a training step from the stated rates of a GPU and its links. Needs no torch: `remoe plan` is quick."""

from dataclasses import dataclass

from remoe.costs import flops_per_sequence
from remoe.lab.scaling.gpus import GPU
from remoe.lab.scaling.shards import FLOAT, Job, groups
from remoe.lab.scaling.traffic import Collective, traffic

EFFICIENCY = 0.5  # of the matrix rate; our layer reached 0.50 to 0.54 of an H200's (docs/performance.md, 2026-11-26)
_OPTIMIZER_PASSES = 7  # AdamW reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step. Latency, memory traffic of activations, data and validation are not in it.

    Attributes:
        products: of the matrix products, with those that are recomputed.
        optimizer: of reading and writing weights, gradients and moments.
        waiting: of the collectives whose result the computation needs at once.
        beside: of those that may run beside the computation.
    """

    products: float
    optimizer: float
    waiting: float
    beside: float

    @property
    def least(self) -> float:
        """When as much as possible runs beside the computation."""
        return max(self.products, self.beside) + self.waiting + self.optimizer

    @property
    def most(self) -> float:
        """When nothing does."""
        return self.products + self.beside + self.waiting + self.optimizer


def step_time(job: Job, density: float, gpu: GPU, efficiency: float = EFFICIENCY) -> StepTime:
    """Estimates a step.

    Args:
        job: the step.
        density: share of the (token, expert) pairs that are executed, 1 - S; equally many for each expert.
        gpu: on which every process runs; neighbouring processes are in one node.
        efficiency: share of the matrix rate that the products reach.
    """
    flops = job.batch_size * flops_per_sequence(job.sizes, job.seq_len, density) / job.mesh.processes
    if job.recompute:
        flops *= 4 / 3
    numbers = sum(group.count * group.shard for group in groups(job.sizes, job.mesh))
    seconds = {True: 0.0, False: 0.0}
    for collective in traffic(job, density):
        seconds[collective.waits] += transfer_time(collective, gpu)
    return StepTime(
        products=flops / (efficiency * gpu.tflops * 1e12),
        optimizer=_OPTIMIZER_PASSES * FLOAT * numbers / (gpu.bandwidth * 1e9),
        waiting=seconds[True],
        beside=seconds[False],
    )


def transfer_time(collective: Collective, gpu: GPU) -> float:
    """Seconds of a collective by bandwidth alone; the slower of the links within and between nodes counts.

    An all-to-all sends each rank's share over its own link. Of the others, the ranks of a group that are in one node
    divide what goes to other nodes among their links, as NCCL's rings do.
    """
    n = collective.ranks
    here = max(1, min(n, gpu.per_node // collective.stride))  # of the group, in one node
    within, between = collective.sent, 0.0 if here == n else collective.sent / here
    if collective.kind == "all-to-all":
        within, between = (collective.sent * peers / (n - 1) for peers in (here - 1, n - here))
    return max(within / (gpu.within * 1e9) if here > 1 else 0.0, between / (gpu.between * 1e9))
