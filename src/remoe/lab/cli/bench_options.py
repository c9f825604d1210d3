"""The options of `remoe bench`, one class a command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Common:
    """Options of every benchmark."""

    out: Path | None = None
    """JSON file to write the measurements to, with the machine, versions and threads."""
    threads: int | None = None
    """Number of CPU threads; PyTorch's default otherwise."""


@dataclass(frozen=True)
class LayerArguments(Common):
    """Time the forward and backward pass of one layer, including its router, against a dense SwiGLU layer.

    The dense layers have the same active FLOPs. Implementations take turns, and the table shows medians. Columns: "ms"
    time; "+-" distance of the quartiles over the median; "/ best" time divided by that of the fastest dense layer that
    PyTorch can run here (MKL, oneDNN or torch.compile); "/ dense" divided by that of nn.Linear; "/ GEMM" FLOP/s of the
    experts as a fraction of those of a large matrix product; "peak" peak memory in MB; "all on" the same with every
    expert active; "host" (GPU only) time until the host has launched all kernels, in ms; "/ first" (experts only) time
    divided by that of the first case, where from both is subtracted what it takes to read all experts' weights twice
    and to write their gradients once, at the rate of memory reads.
    """

    cases: Literal["auto", "cpu", "cuda", "experts"] = "auto"
    """Sizes to measure: those for the device (auto), for a CPU, for a GPU, or 8 to 256 experts at equal active size."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is float32 on a CPU and bfloat16 on a GPU."""
    backends: tuple[str, ...] = ("auto",)
    """Implementations of our experts to measure: auto, naive, cpu, grouped, triton, sonic."""
    peers: bool = True
    """Also measure the other implementations that are installed."""
    compiled: bool = True
    """Also measure the dense layer under torch.compile, which takes some seconds for each size."""
    repetitions: int = 15
    """Number of timed rounds."""
    quick: bool = False
    """Less than a minute on two cores: at most 3 rounds, only our layers and the dense ones, without torch.compile and
    memory."""


@dataclass(frozen=True)
class DecodeArguments(LayerArguments):
    """Time the forward pass of one layer on a few tokens, as in generation.

    The lower bound is the time to read the weights of the active experts, at the memory bandwidth measured in the same
    run. Column "/ reading" is the time divided by that bound.
    """

    cases: Literal["auto"] = "auto"
    """Sizes to measure; there is one set."""


@dataclass(frozen=True)
class GenerateArguments(Common):
    """Time `generate` end to end: prompts, and tokens written after them one at a time, always the likeliest.

    Our ReLU, top-k and dense models, and transformers' Mixtral of the same shape with each of its implementations of
    the experts, have random weights and write the same text. They take turns, and the table shows medians. Columns:
    "tokens/s" new tokens per second; "ms" time of the whole call; "+-" distance of the quartiles over the median;
    "/ theirs" tokens/s divided by those of the fastest Mixtral; "/ token" and "active" experts per token, and experts
    with at least one token, in the passes that write; "/ reading" time divided by that of reading the weights that each
    pass needs, at the memory bandwidth measured in the same run.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Numbers of texts that are written together."""
    prompt_tokens: int = 16
    """Tokens of each prompt."""
    new_tokens: int = 32
    """Tokens written after each prompt."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """transformers' KV cache. On a GPU, transformers compiles models with a static one."""
    d_model: int = 768
    """Model width D."""
    d_ffn: int = 768
    """Width F of an expert; that of the dense model is k F."""
    num_experts: int = 32
    """Number of experts E."""
    k: int = 4
    """Target number of experts per token."""
    layers: int = 4
    """Number of layers."""
    vocab_size: int = 8192
    """Size of the vocabulary."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is float32 on a CPU and bfloat16 on a GPU."""
    peers: bool = True
    """Also measure transformers' Mixtral."""
    repetitions: int = 5
    """Number of timed rounds. A contestant that needs more than five times as long as the fastest has one."""
    quick: bool = False
    """Less than a minute on two cores: at most 3 rounds, only our models, with 2 layers, and no batch of more than 8
    unless --batch-sizes has no smaller one."""


@dataclass(frozen=True)
class LoraArguments(Common):
    """Time the forward and backward pass of one layer with LoRA on its experts, on the routed pairs and by PEFT.

    The weights are frozen, with 8, 32 and 128 experts of two sizes and float32 on a CPU, bfloat16 on a GPU.
    Implementations take turns, and the table shows medians. Columns: "ms" time; "+-" distance of the quartiles over the
    median; "/ PEFT" time divided by PEFT's; "peak" peak memory of the pass in MB. Needs `pip install 'remoe[lora]'`.
    """

    rank: int = 16
    """Rank of the adapters."""
    repetitions: int = 9
    """Number of timed rounds."""
    quick: bool = False
    """Less than a minute on two cores: at most 3 rounds, and only 8 and 32 experts of the smaller size."""


@dataclass(frozen=True)
class TrainStepArguments(Common):
    """Time whole training steps of `remoe train` against transformers' Mixtral in transformers' Trainer.

    All contestants have the same shape, batch, data and optimiser, and take turns. Columns: "/ reference" tokens/s
    divided by Mixtral's; "/ GEMM" the model's FLOP/s as a fraction of those of a large matrix product. Needs
    `pip install 'remoe[bench]'`.
    """

    preset: str = "mini"
    """Model size, batch size and schedule of every contestant."""
    data: str | None = None
    """Text, which is prepared in runs/data, or a folder written by `remoe data prepare`. By default the standard
    library."""
    num_experts: int | None = None
    """Number of experts, instead of the preset's."""
    batch_size: int | None = None
    """Sequences per step, instead of the preset's."""
    compile: bool = False
    """Compile our models with torch.compile."""
    contestants: tuple[str, ...] = ()
    """Those to measure beside "mixtral grouped_mm", by their names in the table; by default all."""
    settle: int = 120
    """Training steps before ReLU routing is measured: it starts with half of its experts active."""
    rounds: int = 7
    """Number of turns of each contestant; the table shows the median."""
    steps: int = 5
    """Steps per turn."""
    quick: bool = False
    """Less than a minute on two cores, once the data is prepared: at most 3 rounds of one step, only "remoe relu" and
    the reference unless --contestants names others, and biases that give ReLU routers their target density in place of
    --settle steps."""
    profile: bool = False
    """Show where the time of a step of one contestant goes ("remoe relu" unless --contestants names another one of
    ours), by PyTorch's profiler over --steps steps on the CPU. It needs no further packages."""


@dataclass(frozen=True)
class DiffArguments:
    """Compare two files that `remoe bench layer`, `decode`, `generate`, `lora` or `train-step` wrote with --out.

    Columns: "before" and "after" in ms; "ratio" after / before; "+-" the larger spread of the two, in percent. A change
    of less than two spreads is called "within spread". The lines above the table name all facts of machine, versions
    and rates that differ.
    """

    before: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BEFORE")]
    """JSON file of the earlier measurement."""
    after: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="AFTER")]
    """JSON file of the later measurement."""
