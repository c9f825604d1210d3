"""Reading foreign torch files without running what is in them.

A pickle names functions to call. Of those, only the few that make tensors and plain containers are called here; any
other, a class of a package that is not installed or `os.system`, becomes an `Inert` object that does nothing.
"""

import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from remoe.errors import ConfigError

_CALLED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): Namespace,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
}
_METADATA = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
_METADATA += ("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")
_CALLED |= {(metadata.__name__, name): getattr(metadata, name) for name in _METADATA}


class Inert:
    """Stands for an object of a class that is not read; takes any arguments and state, and ignores them."""

    def __new__(cls, *_: object, **__: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


class InertUnpickler(pickle.Unpickler):
    """Calls what makes tensors and plain containers, nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return _CALLED.get((module, name), Inert)


def read_torch_file(path: Path) -> dict:
    """What `torch.save` wrote, tensors on the CPU and mapped from the file; unknown objects are `Inert`.

    Raises:
        ConfigError: for a file that is not such a one, or holds no dictionary.
    """
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is no file of torch.save, or one from before torch 1.6")
    module = SimpleNamespace(Unpickler=InertUnpickler, __name__=__name__)
    try:
        data = torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=module)
    except (pickle.UnpicklingError, RuntimeError, TypeError, AttributeError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no dictionary")
    return data


class InertReader(FileSystemReader):
    """torch.distributed.checkpoint's reader, whose metadata file is a pickle as well."""

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                found = InertUnpickler(file).load()
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.path}/.metadata cannot be read: {error}") from error
        if not isinstance(found, Metadata):
            raise ConfigError(f"{self.path}/.metadata describes no checkpoint of torch.distributed.checkpoint")
        found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
