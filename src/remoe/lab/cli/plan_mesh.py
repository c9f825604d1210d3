"""`remoe plan --mesh`: what a run on several processes costs."""

from dataclasses import dataclass, replace

from remoe.costs import ModelSizes, flops_per_sequence
from remoe.errors import ConfigError, check, check_choice
from remoe.lab.scaling.estimate import EFFICIENCY, step_time
from remoe.lab.scaling.gpus import GPU, parse_gpu
from remoe.lab.scaling.memory import rank_memory
from remoe.lab.scaling.shards import Job
from remoe.lab.scaling.traffic import traffic
from remoe.lab.training.mesh import Mesh

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(kw_only=True)
class MeshOptions:
    """Options of `remoe plan` for several processes."""

    mesh: str | None = None
    """Also show what a run on several processes costs, as in `remoe train --mesh`: e.g. fsdp=8,ep=8."""
    gpus: int | None = None
    """Number of processes; without `replicate` in --mesh, as many replicas as they hold."""
    gpu: str | None = None
    """Also estimate the time of a step: a100, h100, h200, b200, or figures (e.g. h200,between=25)."""
    efficiency: float = EFFICIENCY
    """Share of the GPU's matrix rate that the products reach, with --gpu."""
    batch_size: int | None = None
    """Sequences per step, with --mesh; by default the preset's, or one micro-batch of each process."""
    dtype: str = "auto"
    """With --mesh, float32 or bfloat16 (autocast); auto is bfloat16 with --gpu."""
    recompute: bool = False
    """With --mesh, recompute activations in the backward pass."""


def print_mesh(options: MeshOptions, job: Job, gpu: GPU | None) -> None:
    """Prints memory and traffic of a process, and with a GPU the time of a step; see `mesh_job`."""
    sizes = job.sizes
    density = sizes.target_density
    columns = {"settled": density}
    if sizes.steered and density < 0.5:
        columns["dense stage"] = 0.5  # while random weights activate half of the experts
    mesh = job.mesh
    print(
        f"{mesh.processes:,} processes: replicate {mesh.replicate}, fsdp {mesh.fsdp}, ep {mesh.ep}, tp {mesh.tp}; "
        f"{job.batch_size:,} sequences per step, for each part {job.passes} x {job.micro_batch_size}; "
        f"{'bfloat16 autocast' if job.bfloat16 else 'float32'}"
    )
    _print("One process", columns, _memory(job, columns, gpu) + _traffic(job, columns))
    if gpu is None:
        return
    rows = _times(job, columns, gpu, options.efficiency)
    _print(f"Estimated step, at {options.efficiency:g} of the matrix rate", columns, rows)
    print(
        f"GPU: {gpu.tflops:g} TFLOP/s, {gpu.memory:g} GB at {gpu.bandwidth:g} GB/s, links {gpu.within:g} GB/s within "
        f"and {gpu.between:g} GB/s between nodes of {gpu.per_node} ({gpu.source})"
    )
    print("not estimated: latencies, memory traffic of activations, uneven loads, data")


def mesh_job(
    options: MeshOptions, router: str, sizes: ModelSizes, seq_len: int, micro_batch_size: int, batch_size: int
) -> tuple[Job, GPU | None]:
    """The step that the options describe, and the GPU, if any.

    Args:
        options: of the command line, with a mesh.
        router: its name.
        sizes: of the model.
        seq_len: S.
        micro_batch_size: sequences that a process computes at a time, at most.
        batch_size: of the preset.

    Raises:
        ConfigError: for a mesh, a GPU or a batch that are not possible.
    """
    check_choice("dtype", options.dtype, DTYPES)
    check(0 < options.efficiency <= 1, f"--efficiency must be above 0 and at most 1, but is {options.efficiency:g}")
    gpu = None if options.gpu is None else parse_gpu(options.gpu)
    mesh = _mesh(options)
    mesh.check_model(
        router,
        routes_pairs=sizes.routes_pairs,
        experts=sizes.num_experts * sizes.granularity,
        heads=sizes.heads,
        groups=sizes.groups,
        width=sizes.d_ffn // sizes.granularity,
        vocabulary=("the vocabulary", sizes.vocab_size),
    )
    if options.batch_size is not None:
        batch_size = options.batch_size
        check(batch_size >= 1, "--batch-size must be at least 1")
    elif batch_size % mesh.parts:
        batch_size = mesh.parts * micro_batch_size
    mesh.check_batch(batch_size, micro_batch_size)
    micro = min(micro_batch_size, batch_size // mesh.parts)
    bfloat16 = options.dtype == "bfloat16" or (options.dtype == "auto" and gpu is not None)
    recompute, on_gpu = options.recompute, gpu is not None
    return Job(sizes, mesh, seq_len, batch_size, micro, bfloat16, recompute, on_gpu=on_gpu), gpu


def _mesh(options: MeshOptions) -> Mesh:
    assert options.mesh is not None
    mesh, gpus = Mesh.parse(options.mesh), options.gpus
    if gpus is None:
        return mesh
    if "replicate" not in options.mesh and gpus > 0 and gpus % mesh.processes == 0:
        return replace(mesh, replicate=gpus // mesh.processes)
    if gpus != mesh.processes:
        raise ConfigError(f"--mesh {options.mesh} does not fit --gpus {gpus}: it needs {mesh.processes}, or a multiple "
                          "of that without `replicate`")  # fmt: skip
    return mesh


Rows = list[tuple[str, list[str]]]


def _memory(job: Job, columns: dict[str, float], gpu: GPU | None) -> Rows:
    found = [rank_memory(job, density) for density in columns.values()]
    parts = {
        "weights, gradients, AdamW (float32)": [m.weights + m.gradients + m.moments for m in found],
        "activations of a micro-batch": [m.activations for m in found],
        "gathered weights and whole gradients": [m.gathered + m.whole_gradients for m in found],
        "peak memory": [m.peak for m in found],
    }
    rows = [(name, [f"{bytes_ / 2**30:,.2f} GiB" for bytes_ in values]) for name, values in parts.items()]
    if gpu is not None:
        rows.append(("  of the GPU's memory", [f"{m.peak / gpu.memory / 1e9:.0%}" for m in found]))
    return rows


def _traffic(job: Job, columns: dict[str, float]) -> Rows:
    found: dict[str, dict[str, float]] = {}
    for name, density in columns.items():
        for collective in traffic(job, density):
            what = f"sent: {collective.kind} of {collective.purpose.partition(':')[0]}"
            row = found.setdefault(what, dict.fromkeys(columns, 0.0))
            row[name] += collective.sent
    return [(what, [_bytes(sent) for sent in row.values()]) for what, row in found.items()]


def _times(job: Job, columns: dict[str, float], gpu: GPU, efficiency: float) -> Rows:
    found = [step_time(job, density, gpu, efficiency) for density in columns.values()]
    tokens = job.batch_size * job.seq_len
    flops = [job.batch_size * flops_per_sequence(job.sizes, job.seq_len, density) for density in columns.values()]
    most = gpu.tflops * 1e12 * job.mesh.processes

    def span(low: float, high: float, form: str) -> str:
        texts = [format(value, form) for value in (low, high)]
        return texts[0] if texts[0] == texts[1] else " to ".join(texts)

    return [
        ("matrix products", [f"{t.products:.3g} s" for t in found]),
        ("AdamW", [f"{t.optimizer:.3g} s" for t in found]),
        ("collectives that computation waits for", [f"{t.waiting:.3g} s" for t in found]),
        ("collectives that may run beside it", [f"{t.beside:.3g} s" for t in found]),
        ("step", [f"{span(t.least, t.most, '.3g')} s" for t in found]),
        ("tokens per second", [span(tokens / t.most, tokens / t.least, ",.0f") for t in found]),
        ("MFU", [span(f / t.most / most, f / t.least / most, ".0%") for f, t in zip(flops, found, strict=True)]),
    ]


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"


def _print(title: str, columns: dict[str, float], rows: Rows) -> None:
    from rich.table import Table

    from remoe.lab.console import Console

    table = Table("", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for label, values in rows:
        table.add_row(label, *values)
    Console().print(table)
