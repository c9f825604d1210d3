"""What every router shares: its shape checks and its logits in float32.

Legend: T tokens, D model width, E experts.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.routing.assignment import Routing


class Router(nn.Module, ABC):
    """A linear router; subclasses turn its logits into a `Routing`.

    Args:
        d_model: D.
        num_experts: E.
        k: wanted active experts per token, 1 <= k <= E.

    Raises:
        ConfigError: when k is not in 1..E.
    """

    def __init__(self, d_model: int, num_experts: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ConfigError(f"k must be between 1 and the number of experts, but k = {k} and E = {num_experts}")
        self.num_experts = num_experts
        self.k = k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) router logits, float32 (float64 for float64 input), whatever autocast says."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    @abstractmethod
    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        """Routes tokens.

        Args:
            x_TD: (T, D).
            mask_T: (T,) bool, false for padding, which is in no pair and in no statistic.
        """

    def extra_repr(self) -> str:
        return f"d_model={self.weight.shape[1]}, num_experts={self.num_experts}, k={self.k}"
