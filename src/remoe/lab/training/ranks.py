"""The processes that train one model together. With a single process, as without `--mesh`, every method does nothing.

Every rank runs the same loop on its own rows of each batch; rank 0 alone prints and writes.
"""

import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from remoe.errors import ConfigError, RemoeError
from remoe.lab.machine import pick_device
from remoe.lab.training.interrupt import discard_output
from remoe.lab.training.mesh import Mesh
from remoe.models.modeling_remoe import RemoeForCausalLM

T = TypeVar("T")

NORM_EPSILON = 1e-6  # what torch adds to the norm that it divides by


class RankFailed(RemoeError):
    """Another rank failed, which says why."""


class Ranks:
    """This process's place among those of a mesh.

    Args:
        mesh: sizes; as many processes must have been started.
        device: the value of `--device`; with several GPUs, each process of a machine takes its own.
        timeout: seconds after which a collective fails that not all ranks take part in.

    Attributes:
        rank, count: this process's number and the number of processes.
        part: the number of its part of every batch, of `mesh.parts`; processes of tensor parallelism share one.
        first: whether this is rank 0, which prints and writes.
        device: of this process.
        step: at which the ranks are.

    Raises:
        ConfigError: for a device that this machine does not have or that cannot be shared; when transformers is too
            old.
    """

    def __init__(self, mesh: Mesh, device: str = "auto", timeout: int = 600) -> None:
        self.mesh, self.count, self.rank, self.timeout, self.step = mesh, mesh.processes, 0, timeout, 0
        self._joined = False
        self.device = pick_device(device)
        if self.count > 1:
            self._join()
        self.first, self.part = self.rank == 0, self.rank // mesh.tp

    def _join(self) -> None:
        from remoe.models.sharding import check_engine

        check_engine()
        if self.device.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", 0))
            if self.device.index is not None or index >= torch.cuda.device_count():
                raise ConfigError(f"--mesh needs --device cuda and a GPU for each process, but found {self.device}")
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        elif self.device.type != "cpu":
            raise ConfigError(f"--mesh needs --device cpu or cuda, not {self.device.type}")
        self._joined = not dist.is_initialized()
        if self._joined:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=self.timeout)
            store, rank, count = next(rendezvous("env://", timeout=timeout))
            # torchrun keeps the store when it restarts processes: they would find the addresses of the ended ones.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
        self.rank = dist.get_rank()
        if self.rank:
            discard_output()
            logging.getLogger("remoe").setLevel(logging.ERROR)
        # Of views that would have to be copied before a change in place, which this model makes of none.
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        # Gathering experts for a checkpoint takes two collectives, of whose latency DTensor would warn.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context that every rank enters, without collectives, and in which an error on one is raised on all."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self.agree(self.rank + 1 if error else None)
        if error:
            raise error
        if failed:
            raise RankFailed(f"rank {self.rank} stops because rank {failed - 1} failed")

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` returns on each rank; rank 0 calls it before the others, which find what it has prepared."""
        with self.together():
            made = make() if self.first else None
        return make() if made is None else made

    def wait(self) -> None:
        """Returns when all ranks have called it."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU, unlike a barrier of NCCL

    def leave(self) -> None:
        """Waits for the others, and ends the connection to them if this object made it."""
        self.wait()
        if self._joined:
            dist.destroy_process_group()

    def shard(self, model: RemoeForCausalLM) -> None:
        """Spreads a model, the same on every rank and perhaps on the meta device, over the mesh, in place."""
        if self.count > 1:
            from remoe.models.sharding import set_timeout, shard

            shard(model, self.device, **asdict(self.mesh))
            set_timeout(model, self.timeout)

    def rows(self, batch_size: int, micro_batch_size: int) -> list[int]:
        """The rows of a batch that this rank reads and computes, one micro-batch after the other.

        What all ranks compute at the same time are consecutive rows, as in a larger micro-batch of one process.
        """
        parts = self.mesh.parts
        micro = min(micro_batch_size, batch_size // parts)
        return [first + row for first in range(self.part * micro, batch_size, parts * micro) for row in range(micro)]

    def begin_step(self, seed: int, step: int) -> None:
        """Begins a step. Routers that draw random numbers get others for each part, by seed, step and part alone."""
        self.step = step
        if self.part:
            torch.manual_seed(hash((seed, step, self.part)) % 2**63)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a loss that is normalised over the tokens of all ranks."""
        (loss * self.mesh.parts if self.mesh.parts > 1 else loss).backward()  # FSDP averages over the parts

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clips the gradient; returns the norm that it had, 0-dim float32."""
        if self.count == 1:
            parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
            norm = _total_norm([parameter.grad for parameter in parameters])
            # A factor of one would be a pass over all gradients. To compare is to wait for a GPU, which is spared here.
            if norm.device.type != "cpu" or not norm + NORM_EPSILON <= max_norm:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            return norm
        from remoe.models.sharding import clip_gradients

        return clip_gradients(model.parameters(), max_norm)

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor summed over the parts, in place."""
        if self.count > 1:
            if self.rank % self.mesh.tp:
                tensor.zero_()  # another rank has the same
            dist.all_reduce(tensor)
        return tensor

    def check_equal(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raises RemoeError on every rank, naming the first that differs, unless all have the same numbers."""
        if self.count == 1:
            return
        numbers = torch.cat([tensor.detach().flatten().double() for tensor in tensors]).view(torch.int64)  # bits
        of_ranks = [torch.empty_like(numbers) for _ in range(self.count)]
        dist.all_gather(of_ranks, numbers)
        for rank, other in enumerate(of_ranks):
            if not torch.equal(other, of_ranks[0]):
                raise RemoeError(f"{what} of rank {rank} differs from that of rank 0")

    def agree(self, signal: int | None) -> int | None:
        """The number of a signal that any rank has received; a host sync."""
        if self.count == 1:
            return signal
        number = torch.tensor(signal or 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number.item() or None

    def gather(self, text: str) -> list[str]:
        """A text of every rank, on all of them."""
        if self.count == 1:
            return [text]
        texts = [""] * self.count
        dist.all_gather_object(texts, text)
        return texts

    def deal(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This rank's share of some batches, as many as every other rank's, and whether each counts.

        Where there is none left for a rank, it gets one that does not count, so that it takes part in all collectives.
        """
        waiting = iter(batches)
        while turn := list(itertools.islice(waiting, self.mesh.parts)):
            yield turn[min(self.part, len(turn) - 1)], self.part < len(turn)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, 0-dim."""
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    # On a CPU, PyTorch's norm of a whole tensor runs on one thread, and that of rows on all.
    rows = [gradient.flatten(1) if gradient.ndim > 1 else gradient[None] for gradient in gradients]
    return torch.linalg.vector_norm(torch.cat([torch.linalg.vector_norm(row, dim=1) for row in rows]))
