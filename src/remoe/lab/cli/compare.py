"""`remoe compare`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import parse, quiet_transformers
from remoe.lab.training.config import NamedValues

if TYPE_CHECKING:
    from remoe.lab.compare.pool import Tasks
    from remoe.lab.data import Dataset

PROG = "remoe compare"


@dataclass
class CompareOptions:
    """Train a matrix of runs (routers, seeds, sizes, anything) from one file, and compare them.

    At equal tokens, and at equal training FLOPs: a run that spends more or less than the reference is trained again for
    as many steps as cost the same. Whatever stops it, the same command goes on and repeats nothing. Several processes,
    of several machines too where they see one folder, may work on one pool.
    """

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """YAML file: variants (name: options of `remoe train`), and if wanted title, base (options of all), seeds,
    reference, axes (option: values), equal_flops, figures; see experiments/."""
    corpus: str | None = None
    """Text to prepare: a folder with train/ and validation/, or anything that `remoe data prepare` takes. By default
    the standard library."""
    data: str | None = None
    """Folder written by `remoe data prepare`, instead of --corpus."""
    out: str | None = None
    """Where results.md, results.json and figures/ go; by default runs/compare/NAME."""
    pool: str = "runs/pool"
    """Folder of the runs; experiments that share it share runs too."""
    records: str | None = None
    """Folder of the finished runs' records, a JSON file each (options, figures, course, routing); the pool by default.
    A run with a record is not trained again, wherever it was trained."""
    tasks: str | None = None
    """Zero-shot tasks for every run (Table 2), separated by commas, as of `remoe eval --tasks`; needs the extra eval.
    A run whose checkpoints are gone keeps what its record has."""
    task_data: str | None = None
    """Folder with a file TASK.parquet for each task; by default the harness's own, from the Hugging Face hub."""
    limit: int | None = None
    """At most so many rows of each task, evenly spaced; everything by default. A record that has more rows keeps them,
    and gets further tasks with as many."""
    base: NamedValues = field(default_factory=dict)
    """Options of `remoe train` laid over the experiment's base, name by value, for the same matrix at another scale:
    `--base steps 6000 batch_size 64 model.hidden_size 384`."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps."""
    workers: int = 1
    """Runs that train at the same time, sharing the processor's cores evenly, and all GPUs unless --device names one.
    On a processor one for each core is fastest, for the memory of as many runs."""
    list: bool = False
    """Only show which runs there are, and how far."""
    report_only: bool = False
    """Only write the tables and figures of what is finished."""


def compare_command(argv: list[str]) -> int:
    """Runs what is missing, then writes tables and figures; 1 when a run failed, 130 or 143 after a signal."""
    options = parse(CompareOptions, argv, prog=PROG)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars in the table; read when they are imported
    if options.data is not None and options.corpus is not None:
        raise ConfigError("--data and --corpus do not go together")
    if options.tasks is None and (options.task_data is not None or options.limit is not None):
        raise ConfigError("--task-data and --limit need --tasks")
    if options.tasks is not None and (options.list or options.report_only):
        raise ConfigError("--tasks evaluates models: leave it out with --list and --report-only")
    if options.limit is not None and options.limit < 1:
        raise ConfigError("--limit must be at least 1")
    if options.out is not None and Path(options.out).exists() and not Path(options.out).is_dir():
        raise ConfigError(f"--out {options.out} is not a folder")
    if options.workers < 1:
        raise ConfigError("--workers must be at least 1")
    if options.workers > 1 and os.name != "posix":
        raise ConfigError("--workers needs file locks, which this system does not have")

    from remoe.lab.compare.experiment import load_experiment

    experiment = load_experiment(options.experiment, options.base)

    from remoe.lab.compare.live import Live
    from remoe.lab.compare.output import write
    from remoe.lab.compare.pool import Pool
    from remoe.lab.compare.runner import check_device, check_models, train_missing, workers_on
    from remoe.lab.machine import keep_freed_memory, pick_device
    from remoe.lab.training.build import wants_bfloat16
    from remoe.lab.training.interrupt import exit_code

    quiet_transformers()
    keep_freed_memory()
    tasks = _tasks(options)  # before hours of work, not after them
    device = pick_device(options.device)
    check_models(experiment)
    dataset = _dataset(options, experiment.runs[0].config.vocab_size)
    records = Path(options.records) if options.records else None
    bfloat16 = wants_bfloat16("auto", device)
    pool = Pool(Path(options.pool), dataset.fingerprint, records, bfloat16=bfloat16, tasks=tasks)
    if not (options.list or options.report_only):
        check_device(experiment, pool, device)
    live = Live(experiment, pool, options.workers)
    if records is not None and not records.exists():  # perhaps a slip, after which everything is trained again
        print(f"records: {records} is new: no finished runs in it")
    if options.list:
        live.console.print(live.table())
        live.console.print(live.count())
        return 0
    if not options.report_only:
        with live:
            workers = workers_on(options.device, options.workers)
            stopped = train_missing(experiment, pool, dataset, workers, live)
        if stopped is not None:
            return exit_code(stopped)
    elif not any(pool.summary(run) for run in experiment.runs):
        raise ConfigError(f"no run of {options.experiment} is finished yet")
    out = Path(options.out) if options.out else Path("runs/compare") / experiment.name
    live.console.print("writing tables and figures")
    report = write(experiment, pool, dataset, out, options.device)
    if not live.console.is_terminal:
        live.console.print(live.table())
    print(f"tables       {report}   (numbers: {report.with_name('results.json')})")
    print(f"figures      {out / 'figures'}")
    print(f"runs         {pool.path}")
    return 1 if live.failures else 0


def _tasks(options: CompareOptions) -> "Tasks | None":
    if options.tasks is None:
        return None
    from remoe.lab.compare.pool import Tasks
    from remoe.lab.evaluation.zeroshot import load_tasks, parse_tasks

    folder = None if options.task_data is None else Path(options.task_data)
    return Tasks(load_tasks(parse_tasks(options.tasks), folder), options.limit)


def _dataset(options: CompareOptions, vocab_size: int) -> "Dataset":
    from remoe.lab.data import open_dataset
    from remoe.lab.data.corpus import open_corpus
    from remoe.lab.training.train import default_dataset

    if options.data is not None:
        return open_dataset(Path(options.data))
    if options.corpus is None:
        return default_dataset(Path(options.pool), vocab_size, wait=True)
    as_prepared = options.report_only or options.list
    return open_corpus(options.corpus, Path(options.pool), vocab_size, as_prepared=as_prepared)
