"""Memory of one process of a training run, by formula. Needs no torch: `remoe plan` is quick.

Legend: T tokens of a pass, D model width, F expert width, E experts, V vocabulary, L layers.
"""

from dataclasses import dataclass, replace

from remoe.costs import STORED_RATIO, activation_bytes
from remoe.lab.scaling.shards import FLOAT, Group, Job, groups
from remoe.lab.scaling.traffic import RECEIVE_ROWS, pairs_sent

_PAIR_BYTES = 3 * 8 + 2 * 4  # of an exchanged pair beside its rows: its places in lists, and gates


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one process.

    Attributes:
        weights, gradients, moments: float32, of the shards that it keeps.
        gathered: whole weights of layers and head that it holds at a time.
        whole_gradients: of a layer and the head before they are summed over the ranks and sharded.
        activations: stored for the backward pass of one micro-batch.
        scratch: that the experts' backward pass needs.
        peak: the most that it holds at a time. Less than the sum of all where gradients come as activations go.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    whole_gradients: int
    activations: int
    scratch: int
    peak: int


def rank_memory(job: Job, density: float) -> RankMemory:
    """The memory of a process in a step.

    Args:
        job: the step.
        density: share of the (token, expert) pairs that are executed, 1 - S; equally many for each expert.
    """
    found = groups(job.sizes, job.mesh)
    weights = FLOAT * sum(group.count * group.shard for group in found)
    head = next(FLOAT * group.numbers for group in found if group.kept)
    layer = [group for group in found if group.name in ("layers", "experts")]
    layer_gradient = sum(FLOAT * group.numbers for group in layer)
    head_gathered = sum(FLOAT * _gathered(group) for group in found if group.kept)
    # FSDP gathers the layer after the present one too, but not its experts where they are a group of their own.
    layer_gathered = sum(FLOAT * _gathered(group) * (2 if group.name == "layers" else 1) for group in layer)
    stored, of_layer = stored_bytes(job, density)
    scratch = round(_scratch(job, density))
    before = 0 if job.passes == 1 else weights  # gradients of earlier passes
    busy = head_gathered + layer_gathered + scratch
    peaks = (  # within a pass, beside weights and moments
        before + stored + head_gathered + _loss_scratch(job),
        before + stored + head + busy + layer_gradient,  # backward through the last layer
        weights + of_layer + busy + (layer_gradient if job.mesh.parts > 1 else 0),  # and through the first
    )
    return RankMemory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        gathered=head_gathered + layer_gathered,
        whole_gradients=head + layer_gradient,
        activations=stored,
        scratch=scratch,
        peak=3 * weights + max(peaks),
    )


def stored_bytes(job: Job, density: float) -> tuple[int, int]:
    """Activations of a micro-batch that a process stores for the backward pass; and those of one layer in it."""
    m, tp, inputs = job.sizes, job.mesh.tp, FLOAT * job.tokens * job.sizes.d_model
    cut = replace(m, heads=m.heads // tp, groups=m.groups // tp)
    if m.routes_pairs:  # parts of all experts, or whole experts for a part of the tokens
        cut = replace(cut, d_ffn=m.d_ffn // tp)
    options = {"bfloat16": job.bfloat16, "norm_kernels": job.kernels}
    none, one = (
        activation_bytes(replace(cut, layers=layers), job.seq_len, job.micro_batch_size, density, **options)
        for layers in (0, 1)
    )
    of_layer = one - none
    if job.mesh.ep > 1:
        of_layer += round(min(pairs_sent(job, density), RECEIVE_ROWS) * _row(job))
    return none + m.layers * (inputs if job.recompute else of_layer), of_layer


def _row(job: Job) -> int:
    """Bytes that stay of an exchanged pair: its token where it was sent, and the output that came back."""
    return 2 * job.sizes.d_model * job.itemsize + _PAIR_BYTES


def _gathered(group: Group) -> int:
    return group.gathered if group.ranks > 1 else 0


def _scratch(job: Job, density: float) -> float:
    """Of the gradients of a layer's pre-activations and hidden activations, 3 F for each pair, half.

    The CPU kernels hold none where one block has all pairs of an expert, and all otherwise; the kernels for CUDA work
    through windows.
    """
    m = job.sizes
    if not m.routes_pairs:
        return 1.5 * job.itemsize * job.tokens * m.expert_width / m.networks
    width = m.d_ffn // m.granularity // job.mesh.tp
    pairs = job.tokens * m.networks * density
    scratch = 1.5 * width * job.itemsize * min(pairs, STORED_RATIO * job.tokens * m.k * m.granularity)
    if job.mesh.ep > 1:  # rows of gradients, or a round that is recomputed
        scratch += 2 * m.d_model * job.itemsize * min(pairs / job.mesh.tp, RECEIVE_ROWS)
    return scratch


def _loss_scratch(job: Job) -> int:
    """Logits of a chunk of tokens, and their softmax where no kernel writes it over them; under tensor parallelism
    logits and softmax of all tokens, and the gradients of both."""
    if job.mesh.tp > 1:
        return 4 * FLOAT * job.tokens * job.sizes.vocab_size
    chunk = max(512, 2 ** (26 if job.on_gpu else 21) // job.sizes.vocab_size)
    return (1 if job.kernels else 2) * FLOAT * min(chunk, job.tokens) * job.sizes.vocab_size
