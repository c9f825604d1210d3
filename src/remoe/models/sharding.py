"""A model spread over ranks by transformers' engine, with plans and an exchange of tokens of ours.

FSDP shards every weight over ranks that read different data; expert parallelism places whole experts on ranks, which
exchange the routed pairs (`remoe.experts.exchange`); tensor parallelism cuts each matrix among ranks that read the same
data; replicas repeat all of it.
"""

import math
from collections.abc import Iterable
from datetime import timedelta
from importlib.metadata import version
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from remoe.errors import ConfigError, check
from remoe.experts import Experts, stored_pairs
from remoe.experts.exchange import exchange_experts
from remoe.experts.slices import in_slices
from remoe.models.loss import LossHead
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing.assignment import Assignment

TRANSFORMERS = (5, 24)  # the oldest version whose `transformers.distributed` the tests ran with
Block = tuple[tuple[int, int], ...]  # start and end in every dimension of a whole tensor
EXCHANGE = "remoe_ragged"  # our name in transformers' registry of exchanges

FSDP_PLAN = {
    "model.embed_tokens": "free_full_weight",
    "model.layers.*": "free_full_weight",
    "model.norm": "keep_full_weight",
    "lm_head": "keep_full_weight",
}
EP_PLAN = {
    "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",  # the name of the style that cuts along the experts
    "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
    "model.layers.*.mlp.experts": "ep_dispatch_experts",
}


def check_engine() -> None:
    """Raises ConfigError when transformers is too old to spread a model over ranks."""
    found = version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < TRANSFORMERS:
        oldest = ".".join(map(str, TRANSFORMERS))
        raise ConfigError(f"sharded training needs transformers {oldest} or newer, but {found} is installed")


def shard(
    model: PreTrainedModel, device: torch.device, *, replicate: int = 1, fsdp: int = 1, ep: int = 1, tp: int = 1
) -> None:
    """Spreads a model, whose weights are the same on every rank, over replicate * fsdp * tp ranks; in place.

    FSDP averages gradients over the ranks, so a loss that is normalised over all ranks' tokens must be multiplied by
    replicate * fsdp before its backward pass. The tp ranks of a group, neighbours, must be given the same tokens.

    Args:
        model: whole, on any device; a `RemoeForCausalLM`, or a relufied model with LLaMA's names of modules. On the
            meta device, it gets its values afterwards.
        device: where it will train.
        replicate: copies of the sharded model.
        fsdp: ranks over which a copy is sharded; replicate * fsdp * tp is the number of ranks in torch.distributed.
        ep: ranks among which the experts of a copy are divided; a multiple of tp, and a divisor of fsdp * tp and of
            the number of experts. 1: all ranks hold parts of all experts.
        tp: ranks among which each matrix of attention, of the vocabulary, and with ep = 1 of the experts is cut.

    Raises:
        ConfigError: for `ep` or `tp` with a relufied model, whose experts have no exchange and no plan; for tied
            embeddings, which FSDP would shard twice; for weights that are neither float32 nor bfloat16 where no two
            ranks share an expert, because FSDP2 of torch 2.13 divides their gradients twice.
    """
    own = isinstance(model, RemoeForCausalLM)
    check(own or ep == tp == 1, f"a {type(model).__name__} can be spread by fsdp and replicate alone, not by ep or tp")
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.distributed.utils import TransformersDeviceMesh

    EPImplementationInterface.register(EXCHANGE, RaggedExchange)
    config = DistributedConfig(
        dp_replicate_size=replicate,
        fsdp_size=fsdp,
        ep_size=ep,
        tp_size=tp,
        ep_implementation=EXCHANGE,
        fsdp_plan=FSDP_PLAN,
        ep_plan=EP_PLAN if ep > 1 else None,
    )
    tied = model.config.tie_word_embeddings and replicate * fsdp > 1
    check(not tied, "a model whose embeddings are those of its head cannot be spread by fsdp or replicate")
    whole = ep > 1 and config.efsdp_size == 1  # each expert is on one rank of a copy
    exact = model.dtype in (torch.float32, torch.bfloat16)
    check(exact or not whole, f"ep={ep} with as many ranks needs float32 or bfloat16 weights, not {model.dtype}")
    dense = init_device_mesh(device.type, (1, replicate, fsdp, tp), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    experts = init_device_mesh(
        device.type, (1, replicate, config.efsdp_size, ep), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep")
    )
    fuses_loss = own and tp == 1 and model._fuses_loss()
    if fuses_loss:
        model.lm_head.__class__ = LossHead
    model.maybe_distribute_model(model, config, TransformersDeviceMesh(dense, experts))
    if fuses_loss:
        model.lm_head.own_hooks = model.lm_head.count_hooks()


def set_timeout(model: nn.Module, seconds: int) -> None:
    """Sets after how long the collectives of a sharded model fail: groups do not take it from the one of all ranks."""
    meshes = {tensor.device_mesh for tensor in model.parameters() if isinstance(tensor, DTensor)}
    for group in {group for mesh in meshes for group in mesh.get_all_groups()}:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class RaggedExchange:
    """The exchange of a layer's experts, in transformers' terms an `EPImplementation`."""

    def __init__(self, experts: Experts, ep_mesh: Any, tp_mesh: Any) -> None:
        self.experts, self.group = experts, ep_mesh.get_group()
        self.same_tokens = tp_mesh.get_group() if tp_mesh.size() > 1 else None

    def __call__(self, x_TD: Tensor, assignment: Assignment, gate_N: Tensor) -> Tensor:
        if self.same_tokens is None:
            return self._exchange(x_TD, assignment)
        return in_slices(self._exchange, x_TD, assignment, self.same_tokens)

    def _exchange(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        weights = self.experts.gate_up_proj, self.experts.down_proj  # local ones while transformers calls this
        stored = stored_pairs(x_TD, len(assignment.count_E), self.experts.k)
        return exchange_experts(x_TD, *weights, assignment, self.group, self.experts.backend, stored=stored)


def reshard(model: nn.Module) -> None:
    """Frees the whole weights that a forward pass without a backward pass has left, so that parameters are shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard, or the tensor itself where that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sliceable(Protocol):
    """A whole tensor, perhaps a stored one, that can be read in parts."""

    def get_shape(self) -> list[int]:
        """Its size in every dimension."""

    def __getitem__(self, slices: Any) -> Tensor:
        """The part that slices select, one for each dimension; `...` for all of it."""


def shard_of(whole: Sliceable, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, of which only that part is read; on the device of `like`.

    Args:
        whole: of the shape of `like`.
        like: a tensor that is sharded as the result shall be, or one that every process has in full.
    """
    if not isinstance(like, DTensor):
        return whole[...].to(like.device)
    from transformers.distributed.sharding_utils import DtensorShardOperation

    return DtensorShardOperation(like).shard_tensor(whole, device=like.device).contiguous()


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a tensor as one that is sharded as another one is."""
    if not isinstance(tensor, DTensor):
        return part
    layout = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, **layout)


def blocks(tensor: Tensor) -> list[tuple[Block, Tensor]]:
    """What this process has of a tensor: blocks of the whole one, each with its place in that, without empty ones.

    One block, except where tensor parallelism cuts gate and up projections, which are in one matrix: two.
    """
    if not isinstance(tensor, DTensor):
        return [(tuple((0, size) for size in tensor.shape), tensor)]
    asked = _Asked(tensor.shape)
    shard_of(asked, tensor.to("meta"))
    if len(asked.blocks) == 1:
        parts = [tensor.to_local()]
    else:
        first, second, *_ = asked.blocks
        dim = next(dim for dim, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
        sizes = [stop - start for start, stop in (block[dim] for block in asked.blocks)]
        parts = list(tensor.to_local().split(sizes, dim))
    return [(block, part) for block, part in zip(asked.blocks, parts, strict=True) if part.numel()]


class _Asked:
    """Takes the place of a stored tensor, to learn which blocks of it a shard is made of."""

    def __init__(self, shape: torch.Size) -> None:
        self._shape = list(shape)
        self.blocks: list[Block] = []

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, slices: Any) -> Tensor:
        slices = (slice(None),) * len(self._shape) if slices is Ellipsis else slices
        block = tuple(part.indices(size)[:2] for part, size in zip(slices, self._shape, strict=True))
        self.blocks.append(block)
        return torch.empty([stop - start for start, stop in block], device="meta")


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As torch's `clip_grad_norm_`, where the parameters may be sharded over different ranks; one collective.

    Returns:
        0-dim float32, the norm of the whole gradient before; the same on every rank.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(shards)).double()
    copies = torch.tensor([_copies(gradient) for gradient in gradients], device=norms.device)
    square = (norms.square() / copies).sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm.float()


def _copies(tensor: Tensor) -> int:
    """On how many ranks each element is."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    sizes = [tensor.device_mesh.size(dim) for dim, kind in enumerate(tensor.placements) if not kind.is_replicate()]
    return dist.get_world_size() // math.prod(sizes)
