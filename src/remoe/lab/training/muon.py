"""Muon for the matrices of a model, each expert's by itself, and AdamW for all else.

Legend: E experts, M and N the sizes of a matrix.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from remoe.routing import Router

MOMENTUM, STEPS, EPS = 0.95, 5, 1e-7  # those of torch.optim.Muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon/


class Muon(torch.optim.AdamW):
    """`torch.optim.Muon` with adjust_lr_fn="match_rms_adamw", for single matrices and stacks of them; otherwise AdamW.

    A matrix moves by lr * 0.2 * sqrt(max(M, N)) times the nearest orthogonal matrix of its momentum (Nesterov), so
    that AdamW's learning rate and weight decay suit it (arXiv 2502.16982). A stack (E, M, N) is E matrices, which are
    computed together.

    Args:
        matrices: parameters (M, N) or (E, M, N).
        others: groups of parameters for AdamW.
        weight_decay: of the matrices.
        options: lr, betas and more, as for AdamW.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: list[dict[str, Any]], weight_decay: float, **options: Any
    ) -> None:
        groups = [*others, {"params": list(matrices), "weight_decay": weight_decay}]
        super().__init__([group for group in groups if group["params"]], **options)
        self._matrices = {id(parameter) for parameter in groups[-1]["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Moves the matrices, and then the others by AdamW; the gradients of the matrices are freed."""
        assert closure is None, "a closure would have to be called for two optimisers"
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._matrices and parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW passes by parameters without a gradient
        super().step()

    def _move(self, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalised(gradient.lerp(momentum, MOMENTUM))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update.to(parameter), alpha=-lr * 0.2 * math.sqrt(max(parameter.shape[-2:])))


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of each, by five steps of Newton-Schulz in bfloat16.

    Args:
        matrices: (M, N) or (E, M, N). The singular values of the result are between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a stack of experts' matrices."""
    return parameter.ndim == 2 or (parameter.ndim == 3 and "expert" in name)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices of a model but for embeddings, head and routers, which AdamW trains."""
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, Router))]
    if (head := model.get_output_embeddings()) is not None:
        modules.append(head)
    left_out = {id(parameter) for module in modules for parameter in module.parameters()}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in left_out and is_matrix(name, parameter)
    ]
