"""The compiled kernels of the cpu backend: built once with the machine's C++ compiler, if it has one.

The shared library is kept under the user's cache folder (`REMOE_CACHE`, else `$XDG_CACHE_HOME/remoe`), named by a
hash of its source, compiler, flags and processor. `REMOE_KERNELS=0` switches compiled kernels off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

logger = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("rows.h", "gemm.h", "steps.cpp", "passes.cpp"))
# No -ffast-math: it would drop the rounding trick of `exponential`, and switch denormal numbers off for the process.
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_COMPILER_SECONDS = 120
_TORCH = Path(torch.__file__).resolve().parent  # as the system names what it has loaded

_P, _I = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "gather": (_P, _P, _I, _I, _P),
    "scatter_add": (_P, _P, _I, _I, _P),
    "swiglu": (_P, _P, _I, _I, _P),
    "swiglu_backward": (_P, _P, _P, _I, _I, _P, _P, _P),
    "few_tokens": (_P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _P, _P),
}
Sizes = _I * 9  # the struct of that name in passes.cpp
_PASS_ARGUMENTS = {
    "forward_scratch": (Sizes,),
    "backward_scratch": (Sizes,),
    "experts_forward": (_P,) * 6 + (Sizes,) + (_P,) * 3,
    "experts_backward": (_P,) * 8 + (Sizes,) + (_P,) * 5,
}
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Functions:
    """Functions of the library, by name; arguments are addresses and sizes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable: ...


class Kernels(_Functions):
    """The functions of steps.cpp for one dtype."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)


class Passes(_Functions):
    """The functions of passes.cpp, whole passes, for one dtype."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        for name, arguments in _PASS_ARGUMENTS.items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, _I if name.endswith("scratch") else None
            setattr(self, name, function)


@cache
def compiled_passes(dtype: torch.dtype) -> Passes | None:
    """Whole passes for `dtype`, or None: the machine cannot build them, or other products of this dtype are faster."""
    library = _library() if dtype in _SUFFIXES else None
    if library is None or not hasattr(library, f"experts_forward_{_SUFFIXES[dtype]}"):
        return None
    return Passes(library, _SUFFIXES[dtype])


@cache
def compiled_kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for `dtype`, or None where it has none or the machine cannot build them (logged once)."""
    library = _library() if dtype in _SUFFIXES else None
    return None if library is None else Kernels(library, _SUFFIXES[dtype])


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("REMOE_KERNELS") == "0":
        logger.info("compiled CPU kernels are switched off by REMOE_KERNELS=0")
        return None
    if not all(source.is_file() for source in _SOURCES):
        logger.info("an exported model carries no C++ sources: the experts use plain torch operations")
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("no C++ compiler: the experts use plain torch operations between their matrix products")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning("compiled CPU kernels are not available, plain torch operations are used: %s", detail.strip())
        return None


def to_be_built() -> bool:
    """Whether the first use of the kernels will compile them, which takes some seconds."""
    if os.environ.get("REMOE_KERNELS") == "0" or not all(source.is_file() for source in _SOURCES):
        return False
    if (compiler := _compiler()) is None:
        return False
    try:
        return not _plan(compiler)[0].exists()
    except (OSError, RuntimeError, subprocess.SubprocessError):  # what `_library` says of it
        return False


def _compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _plan(compiler: str) -> tuple[Path, list[str], str | None]:
    """Path of the shared library, flags, and the OpenMP library to link."""
    openmp = _openmp_runtime()
    flags = [*_FLAGS, *(["-fopenmp"] if openmp else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    identity = "\0".join((*(p.read_text() for p in _SOURCES), version, *flags, str(openmp), _processor()))
    return _cache_folder() / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so", flags, openmp


def _build(compiler: str) -> Path:
    """Path of the shared library, built unless it is in the cache."""
    library, flags, openmp = _plan(compiler)
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        linked, objects = Path(scratch, "kernels.so"), []
        for source in _SOURCES:
            if source.suffix == ".cpp":
                objects.append(str(Path(scratch, source.stem + ".o")))
                _run(compiler, *flags, "-c", str(source), "-o", objects[-1])
        # Linked by path to the OpenMP runtime that torch runs on: a second one would fight it for the cores.
        _run(compiler, "-shared", *objects, *([openmp] if openmp else []), "-o", str(linked))
        linked.replace(library)
    logger.info("built the CPU kernels: %s", library)
    return library


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILER_SECONDS)


def _cache_folder() -> Path:
    if folder := os.environ.get("REMOE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe"


def _openmp_runtime() -> str | None:
    """The GNU or LLVM OpenMP library that torch has loaded; None where it cannot be found: kernels have one thread."""
    runtimes = [path for path in _loaded_files() if path.name.startswith(("libgomp", "libomp", "libiomp5"))]
    return min(map(str, runtimes), key=_strangeness, default=None)


def _strangeness(library: str) -> tuple[int, str]:
    """Orders OpenMP libraries: one that came with torch, the system's, those of other Python packages."""
    packages, path = _TORCH.parent, Path(library)
    with_torch = path.is_relative_to(_TORCH) or path.is_relative_to(packages / "torch.libs")
    return 0 if with_torch else 2 if path.is_relative_to(packages) else 1, library


def _loaded_files() -> set[Path]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {Path(line.split(maxsplit=5)[-1]) for line in lines if line.count("/")}


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), *features[:2]])
