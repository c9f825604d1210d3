"""From options to a finished run: data, folder, training, summary."""

import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import remoe
from remoe.errors import CheckpointError, OutOfMemory
from remoe.experts.cpu import build as kernels
from remoe.lab.console import say
from remoe.lab.data import (
    TOTAL,
    MixedBatches,
    StreamBatches,
    spot_check,
)
from remoe.lab.files import atomic_write, locked
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.live.growth import Growth
from remoe.lab.live.server import serving
from remoe.lab.machine import keep_freed_memory, machine
from remoe.lab.memory import SMALLER, check_memory, less_memory, ran_out
from remoe.lab.text import lines, short_name, visible
from remoe.lab.training.build import experts_backend, model_config, wants_bfloat16, without_values
from remoe.lab.training.changes import changes_result, differences
from remoe.lab.training.checkpoint import checkpoint_step
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.cost import cost_of, count_parameters
from remoe.lab.training.data import open_training_data
from remoe.lab.training.elastic import launch
from remoe.lab.training.faults import last_words, write_stop
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.interrupt import exit_code
from remoe.lab.training.mesh import mesh_of
from remoe.lab.training.origin import origin_of
from remoe.lab.training.outcome import experts_in_use, outcome
from remoe.lab.training.prolong import prolong
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.sinks import tracker_package
from remoe.lab.training.start import start_of
from remoe.lab.training.trainer import Trainer
from remoe.lab.training.validate import Evaluation, total
from remoe.models.plan import sizes_of
from remoe.routing import ROUTERS
from remoe.stages import first_sparse_step, settling_time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_TOKENS = 120  # of the text that a finished run writes
logger = logging.getLogger(__name__)

MANY_LAYERS = 1_000
_NOT_THE_RUN = {"out", "resume", "live", "log", "mesh", "mesh_timeout"}
_MEMORY_ONLY = ("micro_batch_size", "recompute")  # what they change, a resumed run may change


def run_training(config: TrainConfig, run: RunFolder, saved: TrainConfig | None) -> int:
    """Trains or continues a run; a finished one is left as it is.

    Args:
        config: options.
        run: the run's folder.
        saved: the options that a run was started with, to continue it; None for a new run.

    Returns:
        The exit code: 0 when the run is finished and its summary written; 130, 143 or 141 when SIGINT, SIGTERM or a
        closed output stopped the run after its state was saved.

    Raises:
        ConfigError, DataError, CheckpointError: see `Trainer`.
        CheckpointError: when a resumed run was started with other options, or another process is training it.
    """
    config.check()
    for name in config.log:  # before the data is prepared
        tracker_package(name)
    if saved is not None:
        longer = config.steps != saved.steps
        started = prolong(saved, config, run.path, run.last_checkpoint(verified=True)) if longer else saved
        _check_unchanged(started, config, run)
    ranks = Ranks(mesh_of(config), config.device, config.mesh_timeout)
    older = saved is None and run.config.exists()  # a run that this one is refused to replace
    with last_words(ranks, None if older else run.path):
        return _run(config, run, saved, ranks)


def _run(config: TrainConfig, run: RunFolder, saved: TrainConfig | None, ranks: Ranks) -> int:
    unchanged = saved is not None and differences(saved, config).keys() <= _NOT_THE_RUN
    if unchanged and _is_finished(run, config.steps, ranks):
        print(f"{run.path}: already finished ({config.steps} of {config.steps} steps)")
        print(f"summary      {run.summary}")
        ranks.leave()
        return 0
    # Fails before the data is prepared and the folder made when the model cannot be built or run here.
    origin = origin_of(config, run, resumed=saved is not None)
    shape = origin.configured(config) if origin else model_config(config, config.vocab_size, eos_token_id=0)
    sizes = origin.sizes(config) if origin else sizes_of(shape)
    warning = check_memory(config, sizes, ranks.device, ranks.mesh)
    if config.model.num_hidden_layers > MANY_LAYERS:
        logger.warning("building a model of %s layers, which takes a while", f"{config.model.num_hidden_layers:,}")
    without_values(shape)
    experts_backend(shape, config.dtype, ranks.device)
    if saved is None:
        run.check_new()
    keep_freed_memory()
    dataset = ranks.in_turn(lambda: open_training_data(config, run.path.parent, origin))
    config.data = str(dataset.path.resolve())  # so that the run can be resumed and evaluated from anywhere
    dataset.load_tokenizer()  # fails before the training, not after it
    spot_check(dataset)
    with _memory_errors_in_words(config, run):
        trainer = Trainer(config, dataset, run, ranks, origin)
        if warning:  # not earlier: an error is one line
            logger.warning(warning)
        code = _train(trainer, saved)
        ranks.leave()
        return code


def _train(trainer: Trainer, saved: TrainConfig | None) -> int:
    config, run, ranks = trainer.config, trainer.run, trainer.ranks
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                if saved is None:
                    run.create(config, trainer.dataset.tokenizer_path, launch())
                taken = CheckpointError(f"{run.path}: another process is training this run")
                stack.enter_context(locked(run.path, taken))
        if saved is not None:
            trainer.resume()
            if ranks.first:
                _follow(run, saved, config)
        _print_header(trainer)
        if config.live and ranks.first:
            say(f"live {stack.enter_context(serving(Growth(run)))}: open it in a browser")
        start = start_of(trainer) if trainer.origin else {}
        validation = trainer.train()
        if validation is None:
            print(f"stopped at step {trainer.step}; last checkpoint: {run.last_checkpoint() or 'none yet'}")
            print(f"continue with: remoe train --out {shlex.quote(str(run.path))} --resume")
            write_stop(run.path, ranks, trainer.stopped_by)
            return exit_code(trainer.stopped_by)
        if not ranks.first:
            return 0
        summary = _summarise(trainer, validation) | start
        atomic_write(run.summary, json.dumps(summary, indent=2).encode())
        _print_summary(summary, trainer)
        return 0


@contextmanager
def _memory_errors_in_words(config: TrainConfig, run: RunFolder) -> Iterator[None]:
    """Context in which running out of memory is one line that says with which option to continue."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        option, how = less_memory(config), ""
        if option and run.config.exists():
            how = f"; continue with: remoe train --out {shlex.quote(str(run.path))} --resume {option}"
        raise OutOfMemory(f"out of memory: {option or SMALLER} needs less{how}") from error


def _check_unchanged(saved: TrainConfig, config: TrainConfig, run: RunFolder) -> None:
    for name, (old, new) in differences(saved, config).items():
        if changes_result(name) and name not in _MEMORY_ONLY:
            flag = name.replace("_", "-")
            raise CheckpointError(f"cannot resume {run.path} with --{flag} {new}: it was started with {old}")
    if saved.micro_batch_size != config.micro_batch_size:
        counts = "what the router counts per micro-batch, such as the load in its loss, may change the run a little"
        say(
            f"micro-batches of {config.micro_batch_size} sequences from here on, of {saved.micro_batch_size} before: "
            + (counts if _counts_per_micro_batch(config) else "this changes rounding alone")
        )


def _counts_per_micro_batch(config: TrainConfig) -> bool:
    """Whether the router, or its loss, may depend on which tokens it sees together."""
    router = ROUTERS[config.router]
    plain = router.steered and config.router_options.get("load_balance") is False  # Eq. 9, a sum over tokens
    return router.routes_pairs and not plain


def _follow(run: RunFolder, saved: TrainConfig, config: TrainConfig) -> None:
    """Updates the folder of the data, and what may change on resuming, in the run's options."""
    changed = {name: getattr(config, name) for name in ("data", "steps", "optim", *_MEMORY_ONLY)}
    if replace(saved, **changed) != saved:
        run.write_config(replace(saved, **changed))


def _is_finished(run: RunFolder, steps: int, ranks: Ranks) -> bool:
    """Whether the run has its summary, and its newest checkpoint, if it has any, is that of the last step."""
    if run.load_summary().get("steps") != steps:
        return False
    checkpoint = run.last_checkpoint(verified=True, ranks=ranks)
    return checkpoint is None or checkpoint_step(checkpoint) == steps


def _print_header(trainer: Trainer) -> None:
    model, config, dataset = trainer.model, trainer.config, trainer.dataset
    parameters = count_parameters(model)
    what = f"from {config.from_}" if trainer.origin else config.preset
    dtype = "bfloat16 autocast" if wants_bfloat16(config.dtype, trainer.device) else "float32"
    say(
        f"remoe {remoe.__version__}: {what}, {parameters / 1e6:.2f}M parameters, router {config.router}, "
        f"E {config.num_experts}, k {config.k}, G {config.granularity}, target sparsity {model.sparsity.target:.4g}, "
        f"experts backend {_experts(trainer)}"
    )
    say(
        f"data {dataset.path}: {_data_read(trainer)}"
        f"{', documents masked from each other' if config.mask_documents else ''}"
        f"{', loss on the answers of conversations' if dataset.train.masked else ''}; "
        f"device {trainer.device} ({dtype}, {torch.get_num_threads()} threads); run {trainer.run.path}"
    )
    if trainer.step:
        print(f"resumed at step {trainer.step}")
    elif config.resume:
        print("no checkpoint yet: starting from the beginning")


def _data_read(trainer: Trainer) -> str:
    """Tokens, how often the run reads them, and the domains; with weights, the same for each domain.

    Of a stream, in how many parts it is read, and how much of it is held out.
    """
    config, dataset = trainer.config, trainer.dataset
    if isinstance(trainer.batches, StreamBatches):
        stream, held_out = dataset.manifest.stream, dataset.validation
        return (
            f"{short_name(stream.source)} as a stream in {trainer.batches.parts} parts, but for the documents that are "
            f"held out ({dataset.manifest.validation_fraction:.0%}; {held_out.num_documents:,} of them, "
            f"{held_out.num_tokens:,} tokens, for validation)"
        )
    size = f"{dataset.train.num_tokens:,} training tokens"
    if mixture := _mixture(trainer):
        parts = (f"{short_name(name)} {part['share']:.3g} ({part['epochs']:.2g})" for name, part in mixture.items())
        return f"{size}, domains by weight, as shares of the sequences (times read): {', '.join(parts)}"
    passes = config.steps * config.batch_size * config.seq_len / dataset.train.num_tokens
    return f"{size}, read {passes:.2g} times, domains {', '.join(map(short_name, dataset.domains))}"


def _mixture(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Each domain's share of the run's sequences and how often they are read; empty without weights."""
    batches, config = trainer.batches, trainer.config
    if not isinstance(batches, MixedBatches):
        return {}
    sequences = config.steps * config.batch_size
    return {
        domain: {"share": share, "epochs": share * sequences / batches.windows(domain)}
        for domain, share in batches.shares.items()
    }


def _experts(trainer: Trainer) -> str:
    """The backend; on a CPU also whether its kernels are compiled, and if not, compiles them first."""
    name = experts_backend(trainer.shape, trainer.config.dtype, trainer.device)
    if name != "cpu" or trainer.device.type != "cpu":
        return name
    if kernels.to_be_built():
        say("compiling the experts' kernels for this machine; this happens once and takes seconds")
    compiled = kernels.compiled_kernels(torch.float32) is not None
    return f"{name} ({'compiled kernels' if compiled else 'plain torch operations'})"


def _summarise(trainer: Trainer, validation: dict[str, Evaluation]) -> dict:
    config, target = trainer.config, trainer.model.sparsity.target
    sparsities = trainer.sparsities
    sparse, settled = first_sparse_step(sparsities, target), settling_time(sparsities, target)
    after = torch.tensor(sparsities[settled:] if settled is not None else [], dtype=torch.float64)
    tokenizer = trainer.dataset.load_tokenizer()
    prompt = config.prompt if config.prompt is not None else _validation_prompt(trainer, tokenizer)
    sample = prompt + _continuation(trainer, tokenizer, prompt)
    trainer.run.sample.write_text(sample, encoding="utf-8")
    figures = {
        "steps": trainer.step,
        "router": config.router,
        **cost_of(trainer, total(validation).sparsity),
        **({"mixture": mixture} if (mixture := _mixture(trainer)) else {}),
        "seconds": trainer.seconds,
        "peak_memory_bytes": trainer.peak_memory_bytes,
        "validation_loss": total(validation).loss,
        "validation": {TOTAL: total(validation).to_dict()}
        | {domain: result.to_dict() for domain, result in validation.items()},
        "target_sparsity": target,
        "final_sparsity": sparsities[-1] if sparsities else total(validation).sparsity,
        "sparse_step": sparse if sparse <= len(sparsities) else None,
        "settling_step": None if settled is None else settled + 1,
        "sparsity_mean": after.mean().item() if len(after) else None,
        "sparsity_deviation": after.std().item() if len(after) > 1 else None,
        **experts_in_use(trainer.shape, total(validation)),
        "sample": sample,
        "checkpoint": str(trainer.run.last_checkpoint()),
        "machine": machine(trainer.device),
    }
    return figures | {"outcome": outcome(config, trainer.shape, figures) if trainer.step else []}


def _continuation(trainer: Trainer, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """Text after a prompt; of a transformers model, which may have no positions beyond its context, as far as it goes.

    Nothing where the prompt fills that context.
    """
    options = SamplingOptions(seed=trainer.config.seed, max_new_tokens=SAMPLE_TOKENS)
    if trainer.origin is not None and trainer.origin.relufied:
        room = trainer.shape.max_position_embeddings - len(tokenizer(prompt)["input_ids"])
        options.max_new_tokens = min(options.max_new_tokens, room)
    return generate_text(trainer.whole_model(), tokenizer, prompt, options) if options.max_new_tokens > 0 else ""


def _validation_prompt(trainer: Trainer, tokenizer) -> str:
    """The first tokens of a validation text, so that the prompt is in the language of the data."""
    input_NS, _, mask_NS = next(iter(trainer.windows.batches(trainer.windows.domains[0], 1)))
    return tokenizer.decode(input_NS[0, : min(12, int(mask_NS[0].sum()))].tolist(), skip_special_tokens=True)


def _print_summary(summary: dict, trainer: Trainer) -> None:
    run, everything = trainer.run, summary["validation"][TOTAL]
    say(f"\nfinished: {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes")
    say(
        f"validation loss {everything['loss']:.4f}  perplexity {everything['perplexity']:.2f}  "
        f"bits per byte {everything['bits_per_byte']:.4f}"
    )
    if "start" in summary:
        before = summary["start"]["validation"][TOTAL]["loss"]
        say(f"validation loss at the start {before:.4f}: {everything['loss'] - before:+.4f} since then")
    for domain in trainer.windows.domains:
        say(f"  {short_name(domain):<16} {summary['validation'][domain]['loss']:.4f}")
    for sentence in summary["outcome"]:
        say(sentence)
    print(f"\nsample:\n{lines(summary['sample'])}\n")
    path = shlex.quote(str(run.path))
    words = shlex.quote(visible(" ".join(summary["sample"].split()[:2]) or "The"))
    for what, where in (  # whole, so that they can be copied
        ("run", run.path),
        ("checkpoint", summary["checkpoint"]),
        ("metrics", run.metrics),
        ("curves", f"tensorboard --logdir {path}/tensorboard"),
        ("see it", f"remoe report {path}"),
        ("measure it", f"remoe eval {path}"),
        ("try it", f"remoe generate {path} --prompt {words}"),
    ):
        print(f"{what:<12} {where}")
