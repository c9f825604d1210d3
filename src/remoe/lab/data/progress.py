"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from remoe.lab.console import Console

MEGABYTE = 1_000_000
SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_UPDATES = 0.1


class Reporter:
    """Writes log lines and the progress of long work to stderr."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Write a line, unless quiet."""
        if not self.quiet:
            self.console.print(text)

    @contextmanager
    def task(self, title: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Show one piece of work; the block calls what it is given with the bytes it has done more.

        `total` and `done` are in bytes; `done` was done by an earlier run.
        """
        if self.quiet:
            yield lambda amount: None
        elif self.console.is_terminal:
            with self._bar(title, total, done) as advance:
                yield advance
        else:
            yield self._lines(title, total, done)

    @contextmanager
    def _bar(self, title: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        start = last = time.monotonic()
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, state="")
            finished = done

            def advance(amount: int) -> None:
                nonlocal finished, last
                finished += amount
                now = time.monotonic()
                if now - last >= SECONDS_BETWEEN_UPDATES:  # an update costs more than a short document
                    last = now
                    state = describe(finished, total, finished - done, now - start)
                    progress.update(task, completed=finished, state=state)

            yield advance

    def _lines(self, title: str, total: int | None, done: int) -> Callable[[int], None]:
        start = last = time.monotonic()
        finished = done

        def advance(amount: int) -> None:
            nonlocal finished, last
            finished += amount
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                self.line(f"{title}: {describe(finished, total, finished - done, now - start)}")

        return advance


def describe(done: int, total: int | None, recent: int, seconds: float) -> str:
    """Progress in words: MB done, of how many, and MB/s; all in bytes, `recent` those of the `seconds`."""
    share = f" of {total / MEGABYTE:.1f}" if total is not None else ""
    return f"{done / MEGABYTE:.1f}{share} MB, {recent / MEGABYTE / max(seconds, 1e-9):.1f} MB/s"
