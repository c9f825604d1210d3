"""Throughput of whole training steps: `remoe train` against transformers' Mixtral in transformers' Trainer.

All contestants have the same width, layers, heads, experts, vocabulary, batch, sequences, optimiser, schedule and
number of threads. Each runs its own training loop with all that the loop does by default (batches, clipping,
statistics, records) except validation and saving. Each has its own process, so that allocator settings and caches are
separate. The processes take turns of a few steps, so that a slow moment of the machine affects all of them.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from remoe.errors import ConfigError, RemoeError, missing_extra
from remoe.lab.bench.generate import settle
from remoe.lab.bench.peers import mixtral_model
from remoe.lab.data import Dataset, TrainBatches, open_dataset
from remoe.lab.data.corpus import open_data
from remoe.lab.machine import keep_freed_memory, pick_device
from remoe.lab.training.build import model_config, wants_bfloat16
from remoe.lab.training.config import TrainConfig, config_from_dict
from remoe.lab.training.data import default_dataset
from remoe.lab.training.trainer import Trainer
from remoe.models.modes import evaluating
from remoe.models.plan import flops_per_sequence

REMOE, MIXTRAL = "remoe", "mixtral"
# Name in the table: (package, its router or implementation of the experts, whether the C library keeps freed memory).
# `remoe train` makes that setting and transformers does not; the row of Mixtral with it separates its effect.
CONTESTANTS = {
    "remoe relu": (REMOE, "relu", True),
    "remoe topk": (REMOE, "topk", True),
    "remoe dense": (REMOE, "dense", True),
    "mixtral grouped_mm": (MIXTRAL, "grouped_mm", False),
    "mixtral grouped_mm, memory kept": (MIXTRAL, "grouped_mm", True),
    "mixtral eager": (MIXTRAL, "eager", False),
}
REFERENCE = "mixtral grouped_mm"


@dataclass
class TrainStepOptions:
    """Options of `train_step`."""

    preset: str = "mini"
    """Model size, batch size and schedule of every contestant."""
    data: str | None = None
    """Folder written by `remoe data prepare`. By default the standard library is prepared in runs/data."""
    settle: int = 120
    """Training steps before ReLU routing is measured: it starts with half of its experts active."""
    rounds: int = 7
    """Number of turns of each contestant; the table shows the median."""
    steps: int = 5
    """Steps per turn."""
    biased: bool = False
    """Whether ReLU routers start with biases that give them their target density, instead of `settle` steps."""
    warm_up: int = 5
    """Training steps before the others are measured."""
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    """Contestants to measure; "mixtral grouped_mm" is the reference and always measured."""
    config: dict = field(default_factory=dict)
    """Further options of `remoe train`, nested; they take precedence over the preset."""


@dataclass
class TrainStepResult:
    """The measurements, with all that is needed to interpret them.

    Attributes:
        rows: name, tokens_per_second, ms_per_step, ratio_to_reference (of tokens/s), sparsity S at the end (None for
            Mixtral), and model_flops: FLOP/s by `remoe.costs.flops_per_sequence`.
        details: options, shape, and by name each turn's ms per step and the last loss.
    """

    rows: list[dict[str, object]]
    details: dict[str, object]


def train_step(options: TrainStepOptions) -> TrainStepResult:
    """Measures the contestants in turns; takes about four minutes on two cores with the default options.

    Raises:
        ConfigError: for an unknown preset or contestant.
        ExtraError: when `accelerate`, which transformers' Trainer needs, is not installed.
        DataError: when the data cannot be read.
    """
    check_options(options)
    _check_accelerate()
    config, dataset = training(options)
    model = model_config(config, dataset.vocab_size, dataset.eos_token_id)
    names = [name for name in CONTESTANTS if name in (*options.contestants, REFERENCE)]
    turns: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, dict] = {}
    processes: list[_Contestant] = []
    try:
        for name in names:
            processes.append(_Contestant(name, config, options))
            if not options.biased:  # each warms up alone; with so few steps, starting is what takes the time
                processes[-1].wait()
        for process in processes if options.biased else ():
            process.wait()
        for _ in range(options.rounds):
            for process in processes:
                last[process.name] = process.turn()
                turns[process.name].append(1e3 * last[process.name]["seconds"] / options.steps)
    finally:
        for process in processes:
            process.stop()
    tokens = config.batch_size * config.seq_len
    reference = statistics.median(turns[REFERENCE])
    rows: list[dict[str, object]] = []
    for name in names:
        row = {
            "name": name,
            "tokens_per_second": 1e3 * tokens / statistics.median(turns[name]),
            "ms_per_step": statistics.median(turns[name]),
            "ratio_to_reference": reference / statistics.median(turns[name]),
            "sparsity": last[name]["sparsity"],
        }
        density = model.k / model.num_experts if row["sparsity"] is None else 1 - row["sparsity"]
        per_token = flops_per_sequence(model, config.seq_len, density) / config.seq_len
        rows.append(row | {"model_flops": row["tokens_per_second"] * per_token})
    details = {
        "options": asdict(options) | {"data": dataset.path.name},
        "reference": REFERENCE,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "model": model.to_diff_dict(),
        "ms_per_step": turns,
        "loss": {name: figures["loss"] for name, figures in last.items()},
    }
    return TrainStepResult(rows, details)


def training(options: TrainStepOptions) -> tuple[TrainConfig, Dataset]:
    """The options of `remoe train` for a contestant, for enough steps, and the data.

    Raises:
        ConfigError: for an unknown preset, or options that do not fit together.
        DataError: when the data cannot be read.
    """
    config = config_from_dict({"preset": options.preset, **options.config}, "bench")
    if options.data is None:
        dataset = default_dataset(Path("runs"), config.vocab_size)
    else:
        dataset = open_data(options.data, Path("runs"), config.vocab_size)
    model_config(config, dataset.vocab_size, dataset.eos_token_id)  # raises its errors before any process starts
    config.data = str(dataset.path.resolve())
    config.steps = max(config.steps, options.settle + options.rounds * options.steps + 1)
    return config, dataset


def check_options(options: TrainStepOptions) -> None:
    """Raises ConfigError for an unknown contestant, and for numbers below 1."""
    for name in options.contestants:
        if name not in CONTESTANTS:
            raise ConfigError(f"unknown contestant {name!r}; choose from: {', '.join(CONTESTANTS)}")
    for name in ("settle", "warm_up", "rounds", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, but is {getattr(options, name)}")


def _check_accelerate() -> None:
    try:
        import accelerate  # noqa: F401 - for transformers' Trainer
    except ModuleNotFoundError as error:
        raise missing_extra(error, "bench", "remoe bench train-step") from error


class _Contestant:
    """A process that trains on command."""

    def __init__(self, name: str, config: TrainConfig, options: TrainStepOptions) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, CONTESTANTS[name], config, options, torch.get_num_threads())
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Returns when the process has warmed up."""
        self._receive()

    def turn(self) -> dict:
        """Seconds of one turn, and the loss and sparsity at its end."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, as `_receive` reports
            self._pipe.send("go")
        return self._receive()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=20)
        self._process.kill()

    def _receive(self) -> dict:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RemoeError(f"{self.name}: the process ended unexpectedly; see above") from None
        if isinstance(answer, RemoeError):
            raise answer
        return answer


class _Pace:
    """Called after each step of a training loop: reports at the end of a turn and waits for the next one."""

    def __init__(self, pipe: Connection, warm_up: int, steps: int, device: torch.device) -> None:
        self._pipe, self._left, self._steps, self._device = pipe, warm_up, steps, device
        self._start = 0.0

    def __call__(self, loss: float | None, sparsity: float | None) -> None:
        self._left -= 1
        if self._left:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._pipe.send({"seconds": time.perf_counter() - self._start, "loss": loss, "sparsity": sparsity})
        self._pipe.recv()
        self._left, self._start = self._steps, time.perf_counter()


def warm_up(what: tuple[str, str, bool], options: TrainStepOptions) -> int:
    """Steps of a contestant, a value of CONTESTANTS, before it is measured."""
    return options.settle if what[:2] == (REMOE, "relu") and not options.biased else options.warm_up


def _work(
    pipe: Connection, what: tuple[str, str, bool], config: TrainConfig, options: TrainStepOptions, threads: int
) -> None:
    """What the process of a contestant runs."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - printing progress is part of the work
    torch.set_num_threads(threads)
    whose, variant, keep_memory = what
    if keep_memory:
        keep_freed_memory()
    try:
        device = pick_device(config.device)
        pace = _Pace(pipe, warm_up(what, options), options.steps, device)
        dataset = open_dataset(Path(config.data))
        with tempfile.TemporaryDirectory() as folder:
            if whose == REMOE:
                train_remoe(variant, config, dataset, Path(folder), pace, options.biased)
            else:
                _train_mixtral(variant, config, dataset, Path(folder), pace)
    except RemoeError as error:
        pipe.send(error)
    except EOFError:  # the last turn is over
        pass


Pace = Callable[[float | None, float | None], None]


def train_remoe(
    router: str, config: TrainConfig, dataset: Dataset, folder: Path, pace: Pace, biased: bool = False
) -> None:
    """Trains as `remoe train` does, without validation and checkpoints, until `pace` raises an exception.

    Args:
        router: of the model.
        config, dataset: of the run.
        folder: for the run's files.
        pace: called before every step but the first, with the loss and the sparsity of the step before.
        biased: as in `TrainStepOptions`.
    """
    from remoe.lab.training.folder import RunFolder

    config.router = router
    if biased and router == "relu":
        config.router_options = {**config.router_options, "bias": True}
    config.validate.every = config.checkpoint.every = sys.maxsize

    class Paced(Trainer):
        def _train_step(self, progress):
            if self.step:  # so that a turn includes writing the records of its last step
                pace(self.last["lm_loss"], self.last["sparsity"])
            self.last = super()._train_step(progress)
            return self.last

    trainer = Paced(config, dataset, RunFolder(folder))
    if biased and router == "relu":
        with evaluating(trainer.model):
            settle(trainer.model, trainer.batches.batch(0)[:, :-1].to(trainer.device))
    trainer.train()


def _train_mixtral(experts: str, config: TrainConfig, dataset: Dataset, folder: Path, pace: Pace) -> None:
    from transformers import Trainer as TransformersTrainer
    from transformers import TrainerCallback, TrainingArguments

    ours = model_config(config, dataset.vocab_size, dataset.eos_token_id)
    torch.manual_seed(config.seed)
    # The router's logits enable the auxiliary loss.
    model = mixtral_model(ours, experts, output_router_logits=True, use_cache=False)

    class Pacer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            pace(None, None)

    class Sequential(TransformersTrainer):
        def _get_train_sampler(self, train_dataset=None):  # the sequences are already shuffled
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    device, optim = pick_device(config.device), config.optim
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        max_steps=config.steps,
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        max_grad_norm=optim.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optim.final_lr_ratio},
        warmup_steps=round(optim.warmup_ratio * config.steps),
        bf16=wants_bfloat16(config.dtype, device),
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
    )
    Sequential(model, arguments, train_dataset=_Windows(config, dataset), callbacks=[Pacer()]).train()


class _Windows(torch.utils.data.Dataset):
    """The sequences of `TrainBatches` in their order, one by one."""

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        self._batches = TrainBatches(dataset.train, config.seq_len, 1, config.seed)
        self._length = config.steps * config.batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_S = self._batches.batch(index)[0, :-1]
        return {"input_ids": input_S, "labels": input_S}
