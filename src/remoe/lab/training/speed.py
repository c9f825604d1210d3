"""Speed of a run on several processes: tokens per device, use of the hardware, and time in the exchange of tokens."""

import torch

from remoe.costs import flops_per_sequence
from remoe.experts import exchange
from remoe.lab.scaling.gpus import peak_flops
from remoe.lab.training.mesh import Mesh
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.plan import sizes_of


class Speed:
    """Measures the steps of this process; with one process, `record` is empty.

    Args:
        model: configuration of the model.
        mesh: over which it is spread.
        device: of this process.
        bfloat16: whether matrix products run in bfloat16, the only type whose peak rate is known.
        batch_size, seq_len: of a step.
    """

    def __init__(
        self, model: RemoeConfig, mesh: Mesh, device: torch.device, bfloat16: bool, batch_size: int, seq_len: int
    ) -> None:
        self.mesh, self.sizes, self.batch_size, self.seq_len = mesh, sizes_of(model), batch_size, seq_len
        known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = known if bfloat16 else None

    def start(self) -> None:
        """Begins a step."""
        exchange.stopwatch.start()

    def record(self, seconds: float, sparsity: float) -> dict[str, float]:
        """Fields of a step's record: tokens per second and device, MFU where its peak is known, the exchange's share.

        Args:
            seconds: that the step took.
            sparsity: S of the step, from which follow its FLOPs; recomputed activations do not count.
        """
        if self.mesh.processes == 1:
            return {}
        per_device = self.batch_size / seconds / self.mesh.processes  # sequences
        found = {"tokens_per_second_per_device": per_device * self.seq_len}
        if self.peak is not None:
            found["mfu"] = per_device * flops_per_sequence(self.sizes, self.seq_len, 1 - sparsity) / self.peak
        if self.mesh.ep > 1:
            found["exchange_share"] = exchange.stopwatch.seconds() / seconds
        return found
