"""Memory: what a training run needs, what the machine has, and the errors that say that it ran out.

Imports nothing but Python's own modules, so that the command line can tell such errors from others.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from remoe.costs import ModelSizes, Plan, plan
from remoe.errors import ConfigError
from remoe.lab.scaling.memory import rank_memory
from remoe.lab.scaling.shards import Job
from remoe.lab.training.mesh import Mesh

if TYPE_CHECKING:
    import torch

    from remoe.lab.training.config import TrainConfig

GIB = 2**30
_RAN_OUT = re.compile(r"can(no|')t allocate memory|not enough memory|out of memory|bad_alloc", re.I)
SMALLER = "a smaller model or --seq-len"
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, PyTorch's on any device, or the system's."""
    says_so = isinstance(error, RuntimeError) and _RAN_OUT.search(str(error)) is not None
    return says_so or isinstance(error, MemoryError)


def machine_memory(device: "torch.device") -> tuple[int, int] | None:
    """Bytes that this process can have at most, and those that are free; None where the system does not say."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return total, free
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    found = {name: 1024 * int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.M)}
    if not {"MemTotal", "MemAvailable"} <= found.keys():
        return None
    total = found["MemTotal"] + found.get("SwapTotal", 0)
    free = found["MemAvailable"] + found.get("SwapFree", 0)
    limits = [Path(place).read_text().strip() for place in _CGROUP if Path(place).exists()]
    total = min([total, *(int(limit) for limit in limits if limit.isdigit()), *_address_space()])
    return total, min(total, free)


def _address_space() -> list[int]:
    import resource  # only on POSIX

    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [] if soft == resource.RLIM_INFINITY else [soft]


def check_memory(
    config: "TrainConfig", sizes: ModelSizes, device: "torch.device", mesh: Mesh | None = None
) -> str | None:
    """What to say of a run's memory before it starts; None where it fits.

    Args:
        config: options of the run.
        sizes: of its model.
        device: where it will train.
        mesh: over which the model is spread; None for one process.

    Raises:
        ConfigError: when the machine could not even hold weights, gradients and optimiser.
    """
    memory = machine_memory(device)
    if memory is None:
        return None
    total, free = memory
    mesh = mesh or Mesh()
    if device.type == "cpu":  # the processes of a machine share it
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if mesh.processes > 1 else 1
        total, free = total // here, free // here
    whose = "this machine" if mesh.processes == 1 else "each process"
    state, needed = _needed_bytes(config, sizes, device, mesh, config.micro_batch_size)
    if state > total:
        raise ConfigError(
            f"weights, gradients and optimiser of this model take {_gib(state)}, and {whose} has "
            f"{_gib(total)}: choose a smaller model (`remoe plan` shows what one takes)"
        )
    if (ids := 8 * config.batch_size * (config.seq_len + 1)) > total:
        raise ConfigError(
            f"the tokens of one step alone take {_gib(ids)}, and {whose} has {_gib(total)}: choose a "
            "smaller --batch-size"
        )
    if needed <= free:
        return None
    less = less_memory(config, lambda size: _needed_bytes(config, sizes, device, mesh, size)[1] <= free)
    return f"training may take {_gib(needed)}, and {_gib(free)} are free: {less or SMALLER} needs less"


def less_memory(config: "TrainConfig", fits: Callable[[int], bool] = lambda size: True) -> str | None:
    """The option with which a run, also one that is resumed, takes less memory; None if it has them all.

    Args:
        config: options of the run.
        fits: whether a micro-batch of so many sequences is small enough; if none is, the smallest counts.
    """
    rows = config.batch_size // (Mesh.parse(config.mesh).parts if config.mesh else 1)
    smaller = [n for n in range(min(config.micro_batch_size, rows) - 1, 0, -1) if rows % n == 0]
    if smaller:
        return f"--micro-batch-size {next(filter(fits, smaller), 1)}"
    return None if config.recompute else "--recompute"


def _needed_bytes(
    config: "TrainConfig", sizes: ModelSizes, device: "torch.device", mesh: Mesh, micro_batch_size: int
) -> tuple[int, int]:
    """Bytes of a process: weights, gradients and optimiser; and the most that training takes."""
    if mesh.processes == 1:
        planned = plan(sizes, config.seq_len, micro_batch_size)
        return _state_bytes(config, planned), _training_bytes(config, sizes, micro_batch_size)
    from remoe.lab.training.build import wants_bfloat16

    job = Job(
        sizes,
        mesh,
        config.seq_len,
        config.batch_size,
        min(micro_batch_size, config.batch_size // mesh.parts),
        wants_bfloat16(config.dtype, device),
        config.recompute,
        config.mesh_load == "global",
        device.type == "cuda",
    )
    memory = rank_memory(job, max(sizes.target_density, 0.5) if sizes.steered else sizes.target_density)
    return memory.weights + memory.gradients + memory.moments, memory.peak


def _training_bytes(config: "TrainConfig", sizes: ModelSizes, micro_batch_size: int) -> int:
    planned = plan(sizes, config.seq_len, micro_batch_size)
    state = _state_bytes(config, planned)
    if not config.recompute:
        return state + planned.dense_stage_activation_bytes
    L, inputs = sizes.layers, 4 * micro_batch_size * config.seq_len * sizes.d_model
    # The inputs of all layers, and what one layer stores.
    return state + planned.dense_stage_activation_bytes // L + L * inputs


def _state_bytes(config: "TrainConfig", planned: Plan) -> int:
    """With LoRA, the frozen weights, and those of a checkpoint, into which the adapters are merged."""
    return planned.state_bytes // 2 if config.lora.rank else planned.state_bytes


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
