"""How a mesh spreads a model's weights, by sizes alone. Needs no torch: `remoe plan` is quick.

Follows `remoe.models.sharding`: FSDP shards the first dimension of every weight, padded to a multiple of the ranks;
tensor parallelism cuts attention, experts and vocabulary; expert parallelism divides whole experts.

Legend: D model width, F expert width, E experts, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass

from remoe.costs import ModelSizes
from remoe.lab.training.mesh import Mesh

FLOAT = 4  # bytes of a float32

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Job:
    """One optimiser step of a run on several processes.

    Attributes:
        sizes: of the model.
        mesh: over which it is spread.
        seq_len: S.
        batch_size: sequences of a step, of all processes.
        micro_batch_size: sequences that a process computes at a time.
        bfloat16: whether it trains under bfloat16 autocast; weights are float32 either way.
        recompute: whether layers are recomputed in the backward pass.
        global_load: whether losses count the load of all processes (`--mesh-load global`).
        on_gpu: whether the devices are GPUs, whose loss works on larger chunks.
        kernels: whether norms and the softmax of the loss are compiled kernels, as on a CPU that can build them; they
            keep less.
    """

    sizes: ModelSizes
    mesh: Mesh
    seq_len: int
    batch_size: int
    micro_batch_size: int
    bfloat16: bool = False
    recompute: bool = False
    global_load: bool = True
    on_gpu: bool = False
    kernels: bool = False

    @property
    def passes(self) -> int:
        """Forward and backward passes of a process in a step."""
        return self.batch_size // self.mesh.parts // self.micro_batch_size

    @property
    def tokens(self) -> int:
        """T of one pass of one process."""
        return self.micro_batch_size * self.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the activations that matrix products read."""
        return 2 if self.bfloat16 else FLOAT


@dataclass(frozen=True)
class Group:
    """Weights that FSDP shards and gathers together.

    Attributes:
        name: what they are.
        shapes: of the weights of one rank before FSDP shards them.
        ranks: over which FSDP shards them.
        stride: distance of neighbouring ranks of these in the order of all ranks.
        count: how many such groups the model has.
        kept: gathered once per pass, for forward and backward; the others are gathered for each.
    """

    name: str
    shapes: Shapes
    ranks: int
    stride: int
    count: int = 1
    kept: bool = False

    @property
    def numbers(self) -> int:
        """Numbers of one rank while they are gathered."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shard(self) -> int:
        """Numbers of one rank's shard, padding included."""
        return sum(-(-shape[0] // self.ranks) * math.prod(shape[1:]) for shape in self.shapes)

    @property
    def gathered(self) -> int:
        """Numbers that an all-gather gives, padding included."""
        return self.shard * self.ranks


def groups(sizes: ModelSizes, mesh: Mesh) -> list[Group]:
    """All weights of a model, as FSDP groups them."""
    D, vocabulary = sizes.d_model, (sizes.vocab_size // mesh.tp, sizes.d_model)
    sharded = {"ranks": mesh.fsdp, "stride": mesh.tp}
    tail: Shapes = ((D,), vocabulary)  # the final norm with the head, or with the embedding where that is the head
    layer, experts = _layer(sizes, mesh)
    found = [Group("layers", layer, count=sizes.layers, **sharded), Group("norm and head", tail, kept=True, **sharded)]
    if not sizes.tied:
        found.insert(0, Group("embedding", (vocabulary,), **sharded))
    if experts:
        ranks = mesh.fsdp * mesh.tp // mesh.ep
        found.append(Group("experts", experts, ranks=ranks, stride=mesh.ep, count=sizes.layers))
    return found


def _layer(m: ModelSizes, mesh: Mesh) -> tuple[Shapes, Shapes]:
    """Shapes of a layer's weights on one rank, and apart those of its experts where they are a group of their own."""
    D, tp = m.d_model, mesh.tp
    q, kv = m.heads * m.head_dim // tp, m.groups * m.head_dim // tp
    shapes: list[tuple[int, ...]] = [(q, D), (kv, D), (kv, D), (D, q), (D,), (D,), *m.router_shapes]
    if m.others:
        shapes += [(q,), (kv,), (kv,), (D,)]
    if m.qk_norm:
        shapes += [(m.head_dim,), (m.head_dim,)]
    if m.shared:
        shapes += [(1, 2 * m.shared, D), (1, D, m.shared)]
    networks, width = m.networks, m.expert_width // m.networks
    if mesh.ep > 1:
        networks //= mesh.ep
    elif m.routes_pairs:
        width //= tp
    experts = ((networks, 2 * width, D), (networks, D, width))
    return (tuple(shapes), experts) if mesh.ep > 1 else (tuple(shapes) + experts, ())
