"""`remoe eval`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.helps import EVAL
from remoe.lab.cli.parsing import importing, parse, waiting
from remoe.lab.outputs import check_output, json_with, write_output

if TYPE_CHECKING:
    from remoe.lab.evaluation.sweep import SweepPoint
    from remoe.lab.evaluation.zeroshot import TaskResult

PROG = "remoe eval"


@dataclass
class EvalOptions:
    """Evaluate a trained model: loss, perplexity, bits per byte and sparsity, overall and per domain.

    With --tasks: zero-shot accuracy on tasks of the lm-eval harness instead. Needs `pip install 'remoe[eval]'`.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run (its newest checkpoint is used), one of its checkpoints, or a model's folder with its tokenizer,
    as `remoe export` writes it. With --tasks also the folder of any transformers language model."""
    data: str | None = None
    """Folder written by `remoe data prepare` with the model's tokenizer. By default the data of the run; required for a
    model's folder."""
    split: str = "validation"
    """Part of the data: validation or train."""
    max_tokens: int | None = None
    """Tokens to evaluate (approximate), divided among the domains in proportion to their size; all by default."""
    max_experts: int | None = None
    """The most experts that a token may use: those with its largest gates. No limit by default."""
    quantize: str | None = None
    """Quantise weights, and show the loss before and after: int8 those of experts and attention (needs
    `pip install 'remoe[quantize]'`), int4 those of experts."""
    sweep_threshold: str | None = None
    """Show how loss, active experts and speed change as experts with small gates are left out. Give gate thresholds
    separated by commas, or "auto" for thresholds that leave out 10% to 90% of the active pairs."""
    tasks: str | None = None
    """Tasks separated by commas: arc_easy, arc_challenge, boolq, hellaswag, lambada, piqa, race."""
    task_data: str | None = None
    """Folder with a file TASK.parquet (columns context, choices, gold) for each task. By default the harness downloads
    its own tasks from the Hugging Face hub."""
    limit: int | None = None
    """The most rows of each task, evenly spaced over the task; all by default."""
    batch_size: int = 32
    """Sequences per forward pass."""
    json: str | None = None
    """JSON file to write the figures to as well."""


def eval_command(argv: list[str]) -> int:
    """Prints a table with a row for each domain, threshold or task."""
    options = parse(EvalOptions, argv, prog=PROG, brief=EVAL)
    if options.split not in ("validation", "train"):
        raise ConfigError(f"unknown --split {options.split!r}; choose one of: validation, train")
    if options.batch_size < 1 or (options.max_tokens is not None and options.max_tokens < 1):
        raise ConfigError("--batch-size and --max-tokens must be at least 1")
    if options.limit is not None and options.limit < 1:
        raise ConfigError("--limit must be at least 1")
    if options.tasks is None and (options.task_data is not None or options.limit is not None):
        raise ConfigError("--task-data and --limit need --tasks")
    plain = options.data is options.max_tokens is None and options.split == "validation"
    if options.tasks is not None and not plain:
        raise ConfigError("--data, --max-tokens and --split do not go with --tasks; use --task-data and --limit")
    if options.tasks is not None and not (options.sweep_threshold is options.max_experts is options.quantize is None):
        raise ConfigError("--sweep-threshold, --max-experts and --quantize do not go with --tasks")
    if options.json:  # checked before the work, not after it
        _check_json(Path(options.json))
    if options.sweep_threshold is not None:
        return _sweep(options, options.sweep_threshold)
    return _evaluate_domains(options) if options.tasks is None else _evaluate_tasks(options, options.tasks)


def _check_json(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"--json {path}: {path.parent} is not a folder")
    kinds = [json_with("checkpoint", part) for part in ("all", "points", "tasks")]
    check_output("--json", path, lambda content: any(kind(content) for kind in kinds))


def _evaluate_domains(options: EvalOptions) -> int:
    with importing():
        from remoe.lab.evaluation.trained import evaluate_run

    def evaluated(scheme: str | None):
        with waiting(f"evaluating on {options.split} data"):
            return evaluate_run(
                options.run,
                data=options.data,
                split=options.split,
                max_tokens=options.max_tokens,
                batch_size=options.batch_size,
                max_experts=options.max_experts,
                scheme=scheme,
            )

    checkpoint, dataset, results = evaluated(options.quantize)
    figures = {"checkpoint": str(checkpoint), **results}
    _print_table(f"{checkpoint} on {options.split} data of {dataset}", results)
    if options.quantize is not None:
        *_, before = evaluated(None)
        figures["before_quantisation"] = before["all"]
        print(f"loss {before['all']['loss']:.4f} before {options.quantize}, {results['all']['loss']:.4f} after")
    if options.json:
        write_output(Path(options.json), json.dumps(figures, indent=2).encode())
    return 0


def _sweep(options: EvalOptions, thresholds: str) -> int:
    given = None
    if thresholds != "auto":
        try:
            given = [float(word) for word in thresholds.split(",")]
        except ValueError:
            raise ConfigError(
                f"--sweep-threshold takes numbers separated by commas, or auto, not {thresholds}"
            ) from None

    with importing():
        from remoe.lab.evaluation.sweep import sweep_run

    with waiting(f"evaluating on {options.split} data"):
        checkpoint, dataset, points = sweep_run(
            options.run,
            options.data,
            given,
            split=options.split,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            max_experts=options.max_experts,
            scheme=options.quantize,
        )
    _print_sweep(f"{checkpoint} on {options.split} data of {dataset}", points)
    if options.json:
        figures = {"checkpoint": str(checkpoint), "points": [asdict(point) for point in points]}
        write_output(Path(options.json), json.dumps(figures, indent=2).encode())
    return 0


def _evaluate_tasks(options: EvalOptions, tasks: str) -> int:
    with importing():
        from remoe.lab.evaluation.zeroshot import evaluate_model, load_tasks, parse_tasks
        from remoe.lab.machine import keep_freed_memory, pick_device

    loaded = load_tasks(parse_tasks(tasks), None if options.task_data is None else Path(options.task_data))
    keep_freed_memory()
    sizes = {"limit": options.limit, "batch_size": options.batch_size}
    with waiting("evaluating the tasks"):
        found = evaluate_model(options.run, loaded, **sizes, device=pick_device("auto"))
    if not found.causal:
        print("the router looks ahead: sequences are evaluated one by one, and not comparable with other models")
    _print_tasks(f"zero-shot accuracy of {found.checkpoint}", found.tasks, found.mean_acc)
    if options.json:
        figures = {
            "checkpoint": str(found.checkpoint),
            "task_data": options.task_data,
            "limit": options.limit,
            "batch_size": found.batch_size,
            "causal": found.causal,
            "window": found.window,
            "tasks": {name: asdict(result) for name, result in found.tasks.items()},
            "mean_acc": found.mean_acc,
        }
        write_output(Path(options.json), json.dumps(figures, indent=2).encode())
    return 0


def _print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    from remoe.lab.console import Console
    from remoe.lab.text import short_name

    table = Table("domain", title=title, title_justify="left")
    for column in ("loss", "perplexity", "bits per byte", "sparsity", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for domain, row in results.items():
        table.add_row(
            short_name(domain),
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['sparsity']:.4f}",
            f"{row['tokens']:,}",
        )
    Console().print(table)


def _print_sweep(title: str, points: list["SweepPoint"]) -> None:
    from rich.table import Table

    from remoe.lab.console import Console

    table = Table(title=title, title_justify="left")
    for column in ("gate threshold", "loss", "active experts", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            f"{point.threshold:.4g}",
            f"{point.loss:.4f}",
            f"{point.active_experts:.3f}",
            f"{point.tokens_per_second:,.0f}",
        )
    Console().print(table)


def _print_tasks(title: str, results: dict[str, "TaskResult"], mean: float) -> None:
    from rich.table import Table

    from remoe.lab.console import Console

    table = Table("task", title=title, title_justify="left")
    for column in ("acc", "stderr", "acc_norm", "chance", "examples", "truncated"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.acc:.4f}",
            "" if result.stderr is None else f"{result.stderr:.4f}",
            "" if result.acc_norm is None else f"{result.acc_norm:.4f}",
            f"{result.chance:.4f}",
            f"{result.examples:,}",
            f"{result.truncated:,}",
            end_section=name == list(results)[-1],
        )
    chance = sum(result.chance for result in results.values()) / len(results)
    table.add_row("mean", f"{mean:.4f}", "", "", f"{chance:.4f}", "", "")
    Console().print(table)
