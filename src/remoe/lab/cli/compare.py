"""`remoe compare`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.helps import COMPARE
from remoe.lab.cli.parsing import importing, parse
from remoe.lab.outputs import check_output, json_with
from remoe.lab.training.config import NamedValues

if TYPE_CHECKING:
    from remoe.lab.compare.experiment import Experiment
    from remoe.lab.compare.pool import Tasks
    from remoe.lab.compare.record import DataDescription
    from remoe.lab.data import Dataset

PROG = "remoe compare"


@dataclass
class CompareOptions:
    """Train a matrix of runs (routers, seeds, sizes or any other option) from one file, and compare them.

    Runs are compared at equal tokens and at equal training FLOPs: a run that used more or fewer FLOPs than the
    reference is trained again, for the number of steps with the same FLOPs. After an interruption, the same command
    continues and repeats nothing. Several processes may share a pool, also on several machines with one file system.
    """

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """YAML file with variants (name: options of `remoe train`) and optionally title, base (options of all), seeds,
    reference, axes (option: values), equal_flops and figures; for examples see experiments/."""
    corpus: str | None = None
    """Text to prepare: a folder with train/ and validation/, or any source of `remoe data prepare`. Default: Python's
    standard library."""
    data: str | None = None
    """Folder written by `remoe data prepare`, instead of --corpus; raw text is prepared as by --corpus."""
    out: str | None = None
    """Folder for results.md, results.json, figures.md and figures/. Default: runs/compare/NAME."""
    pool: str = "runs/pool"
    """Folder of the runs; experiments that share it share runs."""
    records: str | None = None
    """Folder for the records of finished runs (options, summary, curves, routing). A run with a record is not trained
    again, wherever it was trained. When tables are written, the records of an experiment are packed into
    NAME.jsonl.xz. Default: unpacked in the pool."""
    tasks: str | None = None
    """Zero-shot tasks to evaluate for every run (Table 2), separated by commas, as in `remoe eval --tasks`; needs the
    extra eval. A run without checkpoints keeps the results in its record."""
    task_data: str | None = None
    """Folder with a file TASK.parquet for each task. Default: the evaluation harness's data from the Hugging Face
    hub."""
    limit: int | None = None
    """Maximum number of rows per task, evenly spaced. Default: all. A record with more rows keeps them, and gets
    further tasks with as many rows."""
    base: NamedValues = field(default_factory=dict)
    """Options of `remoe train` that override the experiment's base, to run the same matrix at another scale:
    `--base steps 6000 batch_size 64 model.hidden_size 384`."""
    device: str = "auto"
    """auto (cuda if available, otherwise cpu), cpu, cuda, cuda:N or mps."""
    workers: int = 1
    """Number of runs to train at the same time. They share the CPU cores evenly, and all GPUs unless --device names
    one. On a CPU, one worker per core is fastest if the memory suffices."""
    list: bool = False
    """Show the runs and their progress, and train nothing."""
    report_only: bool = False
    """Write tables and figures of the finished runs, and train nothing. With packed --records, no data is needed."""


def compare_command(argv: list[str]) -> int:
    """Trains the missing runs, then writes tables and figures; returns 1 if a run failed, 130 or 143 after a signal."""
    options = parse(CompareOptions, argv, prog=PROG, brief=COMPARE)
    os.environ.setdefault("TQDM_DISABLE", "1")  # keeps the harness's bars out of the table; read at import
    if options.data is not None and options.corpus is not None:
        raise ConfigError("--data and --corpus cannot be combined")
    if options.tasks is None and (options.task_data is not None or options.limit is not None):
        raise ConfigError("--task-data and --limit need --tasks")
    if options.tasks is not None and (options.list or options.report_only):
        raise ConfigError("--tasks evaluates models, so it cannot be combined with --list or --report-only")
    if options.limit is not None and options.limit < 1:
        raise ConfigError("--limit must be at least 1")
    if options.out is not None and Path(options.out).exists() and not Path(options.out).is_dir():
        raise ConfigError(f"--out {options.out} is not a folder")
    for name, folder in (("pool", options.pool), ("records", options.records)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(f"--{name} {folder} is not a folder")
    if options.workers < 1:
        raise ConfigError("--workers must be at least 1")
    if options.workers > 1 and os.name != "posix":
        raise ConfigError("--workers needs file locks, which this system does not have")

    from remoe.lab.compare.experiment import load_experiment

    experiment = load_experiment(options.experiment, options.base)
    out = Path(options.out) if options.out else Path("runs/compare") / experiment.name
    _check_results(out)

    with importing():
        from remoe.lab.compare.live import Live
        from remoe.lab.compare.output import pack_records, write
        from remoe.lab.compare.pool import Pool
        from remoe.lab.compare.record import DataDescription
        from remoe.lab.compare.runner import check_device, check_models, train_missing, workers_on
        from remoe.lab.machine import keep_freed_memory, pick_device
        from remoe.lab.training.build import wants_bfloat16
        from remoe.lab.training.interrupt import exit_code

    keep_freed_memory()
    tasks = _tasks(options)  # reports errors before hours of work
    device = pick_device(options.device)
    check_models(experiment)
    records = Path(options.records) if options.records else None
    bfloat16 = wants_bfloat16("auto", device)
    dataset = None
    if (data := _recorded_data(options, experiment, bfloat16)) is None:
        dataset = _dataset(options, experiment.runs[0].config.vocab_size)
        data = DataDescription.of(dataset)
    pool = Pool(Path(options.pool), data.fingerprint, records, bfloat16=bfloat16, tasks=tasks)
    if not (options.list or options.report_only):
        check_device(experiment, pool, device)
    live = Live(experiment, pool, options.workers)
    if records is not None and not records.exists():  # perhaps a typing error, which would train everything again
        live.console.print(f"records: {records} is new; it has no finished runs")
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
    live.console.print("writing tables and figures")
    report = write(experiment, pool, data, out, options.device, dataset)
    if records is not None:
        pack_records(experiment, pool, data)
    if not live.console.is_terminal:
        live.console.print(live.table())
    print(f"tables       {report}\nnumbers      {report.with_name('results.json')}")
    print(f"figures      {out / 'figures.md'}")
    print(f"runs         {pool.path}")
    return 1 if live.failures else 0


def _check_results(out: Path) -> None:
    """Checks that only an earlier comparison's files would be replaced; of those, results.json is written first."""
    numbers = out / "results.json"
    check_output("--out", numbers, json_with("title", "reference", "data"))
    if not numbers.exists():
        for name in ("results.md", "figures.md"):
            check_output("--out", out / name, lambda content: False)


def _tasks(options: CompareOptions) -> "Tasks | None":
    if options.tasks is None:
        return None
    from remoe.lab.compare.pool import Tasks
    from remoe.lab.evaluation.zeroshot import load_tasks, parse_tasks

    folder = None if options.task_data is None else Path(options.task_data)
    return Tasks(load_tasks(parse_tasks(options.tasks), folder), options.limit)


def _recorded_data(options: CompareOptions, experiment: "Experiment", bfloat16: bool) -> "DataDescription | None":
    """The data of the packed records, if neither training nor --data nor --corpus asks for the data itself."""
    if options.records is None or options.data is not None or options.corpus is not None:
        return None
    if not (options.list or options.report_only):
        return None
    from remoe.lab.compare.pool import Pool
    from remoe.lab.compare.record import RecordFolder

    records, found = Path(options.records), []
    for data in RecordFolder(records).data():
        pool = Pool(Path(options.pool), data.fingerprint, records, bfloat16=bfloat16)
        if any(pool.has_record(run) for run in experiment.runs):
            found.append(data)
    if len(found) > 1:
        raise ConfigError(f"{records} has runs of this experiment on several datasets; name one by --data or --corpus")
    return found[0] if found else None


def _dataset(options: CompareOptions, vocab_size: int) -> "Dataset":
    from remoe.lab.data import open_dataset
    from remoe.lab.data.corpus import open_corpus
    from remoe.lab.data.sources import is_raw
    from remoe.lab.training.data import default_dataset

    if options.data is not None and not is_raw(options.data):
        return open_dataset(options.data)
    corpus = options.corpus or options.data
    if corpus is None:
        return default_dataset(Path(options.pool), vocab_size, wait=True)
    as_prepared = options.report_only or options.list
    return open_corpus(corpus, Path(options.pool), vocab_size, as_prepared=as_prepared)
