"""When the compiled kernels of `remoe.experts.cpu` may take the place of PyTorch operations."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from remoe.experts.cpu.build import Kernels, compiled_kernels

PLAIN = (Tensor, nn.Parameter)


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The kernels for these tensors of one dtype on the CPU; None where PyTorch operations must run."""
    # Whoever follows operators (compilers, tracers, counters, distributed and fake tensors) would not see a kernel's.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return None
    dtype = tensors[0].dtype
    for tensor in tensors:  # a loop, because in generation a call of `all` would take as long as a token's norm
        if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.dtype is not dtype:
            return None
    return compiled_kernels(dtype)


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is the forward pass of its class, `kind`, and nothing more: no adapter, no hook."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)
