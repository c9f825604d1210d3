"""Progress of a comparison: a live table on a terminal, otherwise lines of text."""

import json
import os
import statistics
import time
from pathlib import Path

import rich.live
from rich.console import Group
from rich.table import Table
from rich.text import Text

from remoe.lab.compare.budget import matches
from remoe.lab.compare.experiment import Experiment, RunSpec
from remoe.lab.compare.pool import Pool
from remoe.lab.console import Console, duration

TAIL_BYTES = 65536  # contains the last record of most runs
LINE_SECONDS = 60.0  # between progress lines, without a live table


class Live:
    """A table of all runs: the validation loss of finished ones, the progress of others.

    Args:
        experiment: the experiment.
        pool: its runs.
        workers: number of runs that train at the same time.
    """

    def __init__(self, experiment: Experiment, pool: Pool, workers: int = 1) -> None:
        self.experiment, self.pool, self.workers = experiment, pool, workers
        self.console = Console()
        self.failures: dict[str, str] = {}
        self._begin: dict[RunSpec, float] = {}  # of the runs in progress
        self._waiting = self._stopping = False
        self._live = rich.live.Live(console=self.console, refresh_per_second=2, vertical_overflow="visible")
        self._moving = self.console.is_terminal
        self._shown = time.monotonic()

    def __enter__(self) -> "Live":
        if self._moving:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._begin = {}
        if self._moving:
            self._live.update(self.table(), refresh=True)
            self._live.stop()

    def started(self, run: RunSpec) -> None:
        """Reports that a run starts or continues."""
        self._begin[run], self._waiting = time.monotonic(), False
        if not self._moving:
            done = _last_record(self.pool.folder(run).metrics).get("step", 0)
            self.console.print(f"{run.label}: {'resumed' if done else 'started'} at step {done} of {run.steps}")

    def finished(self, run: RunSpec) -> None:
        """Reports that a run is finished."""
        loss = self.pool.summary(run)["validation_loss"]
        minutes = (time.monotonic() - self._begin.pop(run)) / 60
        if not self._moving:
            self.console.print(f"{run.label}: validation loss {loss:.4f} after {minutes:.1f} minutes; {self._count()}")

    def failed(self, run: RunSpec, reason: str) -> None:
        """Reports that a run ended without a summary."""
        self._begin.pop(run, None)
        self.failures[self.pool.name(run)] = reason
        self.console.print(f"{run.label}: failed: {reason}")

    def stopping(self) -> None:
        """Reports a signal; runs in progress take a few seconds to save their state."""
        if not self._stopping:
            self.console.print("stopping: saving checkpoints" if self._begin else "stopping")
        self._stopping = True

    def stopped(self, run: RunSpec) -> None:
        """Reports that a signal stopped a run."""
        self._begin.pop(run, None)
        self.console.print(f"{run.label}: stopped; the same command continues from here")

    def wait(self, run: RunSpec) -> None:
        """Reports that all remaining runs, this one included, are being trained by other processes."""
        if self._moving:
            line = Text(f"{run.label}: another process is training it; {self._count()}")
            self._live.update(Group(self.table(), line))
        elif not self._waiting:
            self.console.print(f"{run.label}: another process is training it; waiting")
        self._waiting = True

    def show(self) -> None:
        """Redraws the live table; without one, prints the progress of each run once in a while."""
        if self._moving:
            lines = [self._line(run) for run in list(self._begin)]
            self._live.update(Group(self.table(), *lines, Text(self._count())))
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            for run in list(self._begin):
                self.console.print(self._line(run))

    def table(self) -> Table:
        """The table: a row for each variant and point, a column for each comparison and seed."""
        tokens = {(run.variant, run.point, run.seed): run for run in self.experiment.runs}
        flops = {
            (match.tokens_run.variant, match.tokens_run.point, match.tokens_run.seed): match.run
            for match in matches(self.experiment, self.pool)
        }
        seeds = list(dict.fromkeys(seed for _, _, seed in tokens))
        title = f"{self.experiment.title}: validation loss at equal tokens" + (" and equal FLOPs" if flops else "")
        table = Table(title=title, title_justify="left")
        for axis, values in self.experiment.axes.items():  # never truncated, because they tell the rows apart
            table.add_column(
                axis.rpartition(".")[2].replace("_", "\n"), justify="right", min_width=max(map(len, map(str, values)))
            )
        table.add_column("variant", no_wrap=True)
        comparisons = [("tokens", tokens)] + ([("FLOPs", flops)] if flops else [])
        for name, _ in comparisons:
            for seed in seeds:
                table.add_column(f"{name}\nseed {seed}", justify="right", no_wrap=True)
        for point in self.experiment.points:
            for variant in self.experiment.variants:
                values = [str(value) for _, value in point]
                cells = [self._cell(runs, (variant, point, seed)) for _, runs in comparisons for seed in seeds]
                table.add_row(*values, variant, *cells)
        return table

    def _cell(self, runs: dict, key: tuple) -> str:
        if key not in runs:
            return ""
        run = runs[key]
        if run is None:  # its number of steps is not known yet
            return "·"
        if (summary := self.pool.summary(run)) is not None:
            return f"{summary['validation_loss']:.4f}"
        if self.pool.name(run) in self.failures:
            return "failed"
        step = _last_record(self.pool.folder(run).metrics).get("step", 0)
        return f"{100 * step // run.steps} %" if step or run in self._begin else "·"

    def _line(self, run: RunSpec) -> Text:
        record = _last_record(self.pool.folder(run).metrics)
        if not record:
            return Text(f"{run.label}: starting")
        left = (run.steps - record["step"]) * record["tokens"] / record["step"] / record["tokens_per_second"]
        return Text(
            f"{run.label}: step {record['step']}/{run.steps}  loss {record['lm_loss']:.4f}  "
            f"sparsity {record['sparsity']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  left {duration(left)}"
        )

    def count(self) -> str:
        """`14 of 26 runs finished; equal FLOPs needs up to 12 more`, those whose steps are not known yet."""
        summaries, known, unknown = self._progress()
        text = f"{len(summaries)} of {known} runs finished"
        return f"{text}; equal FLOPs needs up to {unknown} more" if unknown else text

    def _count(self) -> str:
        """`12 of 39 runs finished, about 3:05:09 left`, estimated from the finished ones."""
        summaries, known, unknown = self._progress()
        total = known + unknown  # counts every run that may be needed
        text = f"{len(summaries)} of {total} runs finished"
        if not summaries or len(summaries) == total:
            return text
        seconds = statistics.mean(summary["seconds"] for summary in summaries)
        return f"{text}, about {duration(seconds * (total - len(summaries)) / self.workers)} left"

    def _progress(self) -> tuple[list[dict], int, int]:
        """Summaries of the finished runs, the number of known runs, and how many more may be needed."""
        found = matches(self.experiment, self.pool)
        known = {run.key: run for run in [*self.experiment.runs, *(match.run for match in found if match.run)]}
        summaries = [summary for run in known.values() if (summary := self.pool.summary(run)) is not None]
        return summaries, len(known), sum(match.run is None for match in found)


def _last_record(path: Path) -> dict:
    """The last complete record of a metrics.jsonl; empty if there is none."""
    try:
        with path.open("rb") as file:
            size, tail = file.seek(0, os.SEEK_END), TAIL_BYTES
            while True:
                file.seek(max(0, size - tail))
                lines = file.read(min(size, tail)).split(b"\n")[:-1]  # the last part may be incomplete
                if len(lines) > 1 or tail >= size:  # the first line is complete only at the start of the file
                    return json.loads(lines[-1]) if lines else {}
                tail *= 2
    except FileNotFoundError:
        return {}
