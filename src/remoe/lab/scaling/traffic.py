"""Bytes that each collective of a training step sends, by formula. Needs no torch: `remoe plan` is quick.

Of n ranks, one sends (n - 1)/n of the result of an all-gather or of the input of a reduce-scatter, and twice that share
of what an all-reduce sums (as a ring does); in an all-to-all it sends what is for others.

Legend: T tokens of a pass, D model width, E experts, L layers.
"""

from dataclasses import dataclass

from remoe.lab.scaling.shards import FLOAT, Group, Job, groups

RECEIVE_ROWS = 65_536  # that of `remoe.experts.exchange`, whose import takes seconds
INDEX = 8  # bytes of an int64 and of a float64


@dataclass(frozen=True)
class Collective:
    """What one rank sends in a step by one kind of collective for one purpose.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce" or "all-to-all".
        purpose: what is sent.
        ranks: of a group.
        stride: distance of neighbouring ranks of a group in the order of all ranks.
        sent: bytes.
        waits: whether computation needs the result at once; otherwise it may go on meanwhile.
    """

    kind: str
    purpose: str
    ranks: int
    stride: int
    sent: float
    waits: bool = False


def traffic(job: Job, density: float) -> list[Collective]:
    """The collectives of one optimiser step, without those of one rank.

    Args:
        job: the step.
        density: share of the (token, expert) pairs that are executed, 1 - S; equally many for each expert.
    """
    mesh = job.mesh
    found: list[Collective] = []
    if mesh.parts > 1:
        for group in groups(job.sizes, mesh):
            found += _of_weights(job, group)
    if mesh.ep > 1:
        found += _of_pairs(job, density)
    if mesh.tp > 1:
        found += _of_tensor_parallelism(job, density)
    found.append(_of_statistics(job))
    return [collective for collective in found if collective.ranks > 1 and collective.sent]


def per_kind(collectives: list[Collective]) -> dict[str, float]:
    """Bytes by kind of collective."""
    kinds = dict.fromkeys(collective.kind for collective in collectives)
    return {kind: sum(c.sent for c in collectives if c.kind == kind) for kind in kinds}


def _of_weights(job: Job, group: Group) -> list[Collective]:
    n, replicas = group.ranks, job.mesh.replicate
    times = job.passes * group.count
    gathers = times * (1 if group.kept else 2)
    place = {"ranks": n, "stride": group.stride}
    whole = FLOAT * group.gathered * (n - 1) / n
    copies = {"ranks": replicas, "stride": job.mesh.fsdp * job.mesh.tp}
    summed = 2 * FLOAT * group.shard * (replicas - 1) / replicas
    return [
        Collective("all-gather", f"weights: {group.name}", sent=gathers * whole, **place),
        Collective("reduce-scatter", f"gradients: {group.name}", sent=times * whole, **place),
        Collective("all-reduce", f"gradients: {group.name}", sent=times * summed, **copies),
    ]


def pairs_sent(job: Job, density: float) -> float:
    """Pairs that a rank's tokens send to experts of all ranks, its own included, in one layer and pass."""
    return job.tokens / job.mesh.tp * job.sizes.networks * density


def _of_pairs(job: Job, density: float) -> list[Collective]:
    """Forward, a pair takes a token to its expert and an output back; backward two gradients take the same ways.

    Recomputed layers do both forward ways again, and so do the rounds after the first in the backward pass.
    """
    P, E = job.mesh.ep, job.sizes.networks
    to_each, chunk = pairs_sent(job, density) / P, max(RECEIVE_ROWS // P, 1)
    row = job.sizes.d_model * job.itemsize
    ways = 2 * (to_each * (3 if job.recompute else 2) + max(to_each - chunk, 0))
    times = job.passes * job.sizes.layers
    counts = times * (2 if job.recompute else 1) * (P - 1) * E * INDEX
    return [
        Collective("all-to-all", "routed pairs", P, 1, times * (P - 1) * ways * row, waits=True),
        Collective("all-gather", "counts of pairs", P, 1, counts, waits=True),
    ]


def _of_tensor_parallelism(job: Job, density: float) -> list[Collective]:
    """All-reduces of activations: of the embedding, of the attention's output and of the gradients of its inputs.

    Experts add their output, the gradient of their tokens, and those of the gates; the head the gradient of its input,
    and its logits are gathered. Experts that are divided (ep) gather their output and the gradient of their tokens.
    """
    m, n = job.sizes, job.mesh.tp
    hidden, share, cut = job.tokens * m.d_model, (n - 1) / n, m.routes_pairs and job.mesh.ep == 1
    outputs = 1 + job.recompute + cut  # of attention and experts; recomputation stops before the latter
    gradients = 3 + cut  # by q, k and v, and by the experts
    sums = hidden * (m.layers * (outputs * job.itemsize + gradients * FLOAT) + 2 * FLOAT)
    gates = m.layers * FLOAT * job.tokens * m.networks * density * m.routes_pairs
    reduced = job.passes * 2 * share * (sums + gates)
    logits = job.passes * share * job.itemsize * job.tokens * m.vocab_size
    padded = 0 if job.mesh.ep == 1 else -(-job.tokens // n) * n  # outputs forward, gradients backward
    slices = job.passes * m.layers * 2 * share * job.itemsize * padded * m.d_model
    return [
        Collective("all-reduce", "activations", n, 1, reduced, waits=True),
        Collective("all-gather", "logits", n, 1, logits, waits=True),
        Collective("all-gather", "tokens of experts", n, 1, slices, waits=True),
    ]


def _of_statistics(job: Job) -> Collective:
    """Statistics of the routers, the load that losses take, the norm of the gradient and the losses."""
    m, n = job.sizes, job.mesh.processes
    controller = INDEX * (2 * m.layers * m.networks + m.layers + 2)
    loads = job.passes * m.layers * (2 if job.recompute else 1) * INDEX * (m.networks + 1)
    numbers = controller + loads * (job.global_load and m.balances) + INDEX + 3 * FLOAT
    return Collective("all-reduce", "statistics", n, 1, 2 * numbers * (n - 1) / n, waits=True)
