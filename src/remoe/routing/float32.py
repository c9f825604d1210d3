"""State that moves in small steps, and so must not be rounded: lambda, and what routers steer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn


class Float32State(nn.Module):
    """A module whose own buffers keep dtype and value when it is cast: state that moves in small steps.

    Casting a module goes through `_apply`. FullyShardedDataParallel with a `buffer_dtype` does not: in its first
    forward pass it assigns to the buffers' `data`. Code that computes with the buffers calls `keep_float32` first.
    """

    if TYPE_CHECKING:  # buffers, which are registered by name

        def __getattr__(self, name: str) -> Any: ...

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self.keep_float32()

    def train(self, mode: bool = True) -> Self:
        self.keep_float32()
        return super().train(mode)

    def keep_float32(self) -> None:
        """Takes back a cast of the buffers' `data`: exactly, unless a rounded buffer was written to since."""
        if torch.compiler.is_compiling():
            return
        kept: dict[str, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_kept", {})
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            same, exact = kept.get(name, (None, buffer))
            if same is buffer and buffer.dtype != exact.dtype:
                exact = exact.to(buffer.device)
                unchanged = torch.equal(exact.to(buffer.dtype), buffer)
                buffer.data = exact if unchanged else buffer.to(exact.dtype)
            kept[name] = buffer, buffer.detach()  # a second name of its memory, which an assigned `data` leaves alone

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        self.keep_float32()
        return self
