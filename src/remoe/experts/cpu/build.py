"""The compiled kernels of the cpu backend: built once with the machine's C++ compiler, if it has one.

The shared library is kept in the user's cache folder (`remoe.experts.cpu.cache`), named by a hash of its source,
compiler, flags and processor. `REMOE_KERNELS=0` switches compiled kernels off. `REMOE_PRODUCT` says whose matrix
product the passes use: `own` or `mkl`. By default it is MKL's on Intel's processors, in bfloat16 on those with AMX.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from remoe.errors import check_choice
from remoe.experts.cpu.cache import find_library, is_kept, make_library
from remoe.matmul import has_amx, is_intel

logger = logging.getLogger(__name__)

_NAMES = ("rows.h", "gemm.h", "dots.h", "library.h", "adapters.h", "steps.cpp", "passes.cpp", "rowwise.cpp")
_SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
# No -ffast-math: it would drop the rounding trick of `exponential`, and switch denormal numbers off for the process.
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_SECONDS = 120  # for each call of the compiler
_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)  # RuntimeError: no home folder
_TORCH = Path(torch.__file__).resolve().parent  # as the system names what it has loaded

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Heads = _I * 6  # the struct of that name in rowwise.cpp
_ARGUMENTS = {
    "gather": (_P, _P, _I, _I, _P),
    "scatter_add": (_P, _P, _I, _I, _P),
    "swiglu": (_P, _P, _I, _I, _P),
    "swiglu_backward": (_P, _P, _P, _I, _I, _P, _P, _P),
    "few_tokens": (_P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _P, _P),
    "few_tokens_by_gates": (_P,) * 4 + (_I,) * 5 + (_P,),
    "scaled_by_gates": (_P,) * 6 + (_I,) * 5 + (_P,),
    "packed_by_gates": (_P,) * 4 + (_I,) * 5 + (_P,),
    "rms_norm": (_P, _P, _P, _I, _I, _F, _P, _P, _P),
    "rms_norm_backward": (_P,) * 5 + (_I, _I, _P, _P),
    "rotate": (Heads, _P, _P, Heads) + (_I,) * 5 + (ctypes.c_bool,),
}
_FLOAT32_ARGUMENTS = {"cross_entropy": (_P, _P, _I, _I, _P)}
_ANSWERING = ("_by_gates", "cross_entropy")  # ends of names that return a bool; the others return nothing
Sizes = _I * 10  # the struct of that name in passes.cpp
AdapterArguments = _I * 10  # and this one's; None: no adapters
_PASS_ARGUMENTS = {
    "forward_scratch": (Sizes, _P),
    "backward_scratch": (Sizes, _P),
    "experts_forward": (_P,) * 6 + (Sizes, _P) + (_P,) * 3,
    "experts_backward": (_P,) * 8 + (Sizes, _P) + (_P,) * 5,
}
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Functions:
    """Functions of the library, by name; arguments are addresses and sizes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable: ...


class Kernels(_Functions):
    """The functions of steps.cpp and rowwise.cpp for one dtype."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        for name, arguments in (_ARGUMENTS | (_FLOAT32_ARGUMENTS if suffix == "float32" else {})).items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, ctypes.c_bool if name.endswith(_ANSWERING) else None
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
    gemm = _library_gemm(dtype)
    if dtype is torch.bfloat16 and gemm is None and has_amx() and not os.environ.get("REMOE_PRODUCT"):
        return None  # our product has no AMX, oneDNN's has
    getattr(library, f"use_library_{_SUFFIXES[dtype]}")(gemm)
    return Passes(library, _SUFFIXES[dtype])


def time_products(on: bool) -> float:
    """Seconds, of all threads together, in the passes' matrix products since the last call; `on` times further ones."""
    library = _library()
    if library is None:
        return 0.0
    library.time_products.restype, library.time_products.argtypes = _I, (ctypes.c_bool,)
    return library.time_products(on) / 1e9


def _library_gemm(dtype: torch.dtype) -> ctypes.c_void_p | None:
    """The address of MKL's product of this dtype in PyTorch, where the experts' products are MKL's; None for ours.

    Raises:
        ConfigError: REMOE_PRODUCT is neither `own` nor `mkl`, or it is `mkl` and this PyTorch has no such product.
    """
    name, address = {torch.float32: "sgemm_", torch.bfloat16: "gemm_bf16bf16f32_"}[dtype], None
    if torch.backends.mkl.is_available():
        address = getattr(ctypes.CDLL(str(_TORCH / "lib" / "libtorch_cpu.so")), name, None)
    fastest = "mkl" if address is not None and is_intel() and (dtype is torch.float32 or has_amx()) else "own"
    choice = os.environ.get("REMOE_PRODUCT") or fastest
    check_choice("REMOE_PRODUCT", choice, ("own",) if address is None else ("own", "mkl"))
    return None if choice == "own" or address is None else ctypes.cast(address, ctypes.c_void_p)


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
    compilers = _compilers()
    if not compilers:
        logger.info("no C++ compiler: the experts use plain torch operations between their matrix products")
        return None
    failures: dict[str, str] = {}
    for find in (_find, _make):
        for compiler in compilers:
            try:
                if (library := find(compiler)) is not None:
                    return library
            except _FAILURES as error:
                failures[compiler] = (getattr(error, "stderr", None) or str(error)).strip()
    reasons = "; ".join(f"{compiler}: {reason}" for compiler, reason in failures.items())
    logger.warning("compiled CPU kernels are not available, plain torch operations are used: %s", reasons)
    return None


def to_be_built() -> bool:
    """Whether the first use of the kernels will compile them, which takes some seconds."""
    if os.environ.get("REMOE_KERNELS") == "0" or not all(source.is_file() for source in _SOURCES):
        return False
    works = False
    for compiler in _compilers():
        try:
            if is_kept(_plan(compiler)[0]):
                return False
            works = True
        except _FAILURES:  # what `_library` says of it
            continue
    return works


def _compilers() -> list[str]:
    """Paths of the C++ compilers, in the order in which they are tried."""
    return list(dict.fromkeys(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))))


def _find(compiler: str) -> ctypes.CDLL | None:
    return find_library(_plan(compiler)[0])


def _make(compiler: str) -> ctypes.CDLL:
    identity, flags, openmp = _plan(compiler)

    def build(scratch: Path) -> Path:
        linked, sources = scratch / "kernels.so", [source for source in _SOURCES if source.suffix == ".cpp"]
        objects = [str(scratch / f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor() as threads:  # each waits for a compiler of its own
            compile_ = partial(_run, compiler, *flags, "-c")
            list(threads.map(lambda source, object_: compile_(str(source), "-o", object_), sources, objects))
        # Linked by path to the OpenMP runtime that torch runs on: a second one would fight it for the cores.
        _run(compiler, "-shared", *objects, *([openmp] if openmp else []), "-o", str(linked))
        return linked

    return make_library(identity, build)


def _plan(compiler: str) -> tuple[str, list[str], str | None]:
    """Name of the shared library, flags, and the OpenMP library to link."""
    openmp = _openmp_runtime()
    flags = [*_FLAGS, *(["-fopenmp"] if openmp else [])]
    version = _run(compiler, "--version")
    identity = "\0".join((*(p.read_text() for p in _SOURCES), version, *flags, str(openmp), _processor()))
    return f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}", flags, openmp


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS)
    return done.stdout


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
