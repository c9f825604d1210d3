"""Building a model without its matrices: their initial values are drawn later, one matrix at a time, bit for bit.

While a model is built under `Deferred`, its matrices are on the meta device, and each operation that writes to one is
put on its list, with the state of the random generator. The numbers are drawn all the same and thrown away, so the
generator ends in the state in which it would. `values` draws them again.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from remoe.models.sharding import local, shard_of


class _Write(NamedTuple):
    """An operation in place on (a view of) a matrix."""

    function: Any
    view: tuple[torch.Size, tuple[int, ...], int]  # size, strides and first element
    arguments: tuple
    options: dict[str, Any]
    generator: Tensor | None  # its state before

    def apply(self, whole: Tensor) -> None:
        self.function(whole.as_strided(*self.view), *self.arguments, **self.options)


class Deferred(TorchDispatchMode):
    """Context in which floating-point tensors of two or more dimensions that `torch.empty` makes take no memory.

    Those are the matrices of a model: vectors and buffers, which are small, are made as usual. On the CPU only.

    Args:
        draw: whether random numbers are drawn; otherwise `fill` must not be called, because the model's values come
            from elsewhere.
    """

    def __init__(self, draw: bool = True) -> None:
        super().__init__()
        self._draw = draw
        self._writes: dict[int, list[_Write]] = defaultdict(list)  # by the address of the storage
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, because an address would be used again
        self._names: dict[str, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = dict(options or {})
        dtype = options.get("dtype") or torch.get_default_dtype()
        if function is torch.ops.aten.empty.memory_format and len(arguments[0]) >= 2 and dtype.is_floating_point:
            options["device"] = torch.device("meta")
        written = arguments[0] if function._schema.is_mutable and arguments else None
        if isinstance(written, Tensor) and written.is_meta:
            self._record(function, written, arguments[1:], options)
        return function(*arguments, **options)

    def _record(self, function: Any, written: Tensor, arguments: tuple, options: dict[str, Any]) -> None:
        random = torch.Tag.nondeterministic_seeded in function.tags
        view = written.shape, written.stride(), written.storage_offset()
        write = _Write(function, view, arguments, options, torch.get_rng_state() if random else None)
        storage = written.untyped_storage()
        self._storages[storage._cdata] = storage
        self._writes[storage._cdata].append(write)
        if random and self._draw:
            write.apply(self._space(storage.nbytes(), written.dtype))

    def remember(self, model: nn.Module) -> None:
        """Notes which parameter is which matrix; to be called before the model is sharded."""
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                self._names[name] = parameter.untyped_storage()._cdata
        missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        assert not missing, f"buffers without values: {missing}"

    def fill(self, model: nn.Module) -> None:
        """Draws the initial values of each parameter that was deferred, and keeps what this process has of it."""
        parameters = dict(model.named_parameters())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for name, storage in self._names.items():
                parameter = parameters[name]
                local(parameter).copy_(shard_of(_Whole(self._values(storage, parameter)), parameter))

    def _space(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of so many bytes, one-dimensional and the same in every call: freed pieces would not be used again."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size].view(dtype)

    def _values(self, storage: int, like: Tensor) -> Tensor:
        whole = self._space(like.numel() * like.element_size(), like.dtype).view(like.shape)
        for write in self._writes[storage]:
            if write.generator is not None:
                torch.set_rng_state(write.generator)
            write.apply(whole)
        return whole


class _Whole:
    """A tensor in memory, where `shard_of` expects a stored one."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, slices: Any) -> Tensor:
        return self._tensor[slices]


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives memory, with any values, to what this process has of each parameter on the meta device; ties are kept."""
    for parameter in list(model.parameters()):
        if parameter.is_meta:
            empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)
    model._apply(lambda tensor: tensor)  # FSDP looks at its parameters again
