"""A model spread over ranks by transformers' engine, with plans and an exchange of tokens of ours.

FSDP shards every weight over ranks that read different data; expert parallelism places whole experts on ranks, which
exchange the routed pairs (`remoe.experts.exchange`); tensor parallelism cuts each matrix among ranks that read the same
data; replicas repeat all of it.
"""

import math
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from remoe.errors import ConfigError
from remoe.experts import Experts, stored_pairs
from remoe.experts.exchange import exchange_experts
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing.assignment import Assignment

TRANSFORMERS = (5, 24)  # the oldest version whose `transformers.distributed` the tests ran with
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
    model: RemoeForCausalLM, device: torch.device, *, replicate: int = 1, fsdp: int = 1, ep: int = 1, tp: int = 1
) -> None:
    """Spreads a model, whose weights are the same on every rank, over replicate * fsdp * tp ranks; in place.

    FSDP averages gradients over the ranks, so a loss that is normalised over all ranks' tokens must be multiplied by
    replicate * fsdp before its backward pass. The tp ranks of a group, neighbours, must be given the same tokens.

    Args:
        model: whole, on any device.
        device: where it will train.
        replicate: copies of the sharded model.
        fsdp: ranks over which a copy is sharded; replicate * fsdp * tp is the number of ranks in torch.distributed.
        ep: ranks among which the experts of a copy are divided; a divisor of fsdp and of the number of experts.
        tp: ranks among which each matrix of attention, of the experts and of the vocabulary is cut; with ep = 1 only.
    """
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
    dense = init_device_mesh(device.type, (1, replicate, fsdp, tp), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    experts = init_device_mesh(
        device.type, (1, replicate, config.efsdp_size, ep), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep")
    )
    model.maybe_distribute_model(model, config, TransformersDeviceMesh(dense, experts))


class RaggedExchange:
    """The exchange of a layer's experts, in transformers' terms an `EPImplementation`."""

    def __init__(self, experts: Experts, ep_mesh: Any, tp_mesh: Any) -> None:
        self.experts, self.group = experts, ep_mesh.get_group()

    def __call__(self, x_TD: Tensor, assignment: Assignment, gate_N: Tensor) -> Tensor:
        weights = self.experts.gate_up_proj, self.experts.down_proj  # local ones while transformers calls this
        stored = stored_pairs(x_TD, len(assignment.count_E), self.experts.k)
        return exchange_experts(x_TD, *weights, assignment, self.group, self.experts.backend, stored=stored)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread the model over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def unsharded_twin(model: RemoeForCausalLM) -> RemoeForCausalLM:
    """A model of the same configuration on the meta device, which saves whole weights that it is given."""
    with torch.device("meta"):
        return type(model)(type(model.config).from_dict(model.config.to_dict()))


def reshard(model: nn.Module) -> None:
    """Frees the whole weights that a forward pass without a backward pass has left, so that parameters are shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard, or the tensor itself where that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process has it; every rank that holds a shard must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, as another tensor is sharded; the tensor itself where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    from transformers.distributed.sharding_utils import DtensorShardOperation

    shard = DtensorShardOperation(like).shard_tensor(tensor, device=like.device, dtype=tensor.dtype)
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(shard.contiguous(), like.device_mesh, like.placements, **layout)


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
    norm = square.sqrt().float()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _copies(tensor: Tensor) -> int:
    """On how many ranks each element is."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    sizes = [tensor.device_mesh.size(dim) for dim, kind in enumerate(tensor.placements) if not kind.is_replicate()]
    return dist.get_world_size() // math.prod(sizes)
