"""Output on the terminal: rich's console, for which a closed output is an error, and progress of long work."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import console
from rich.text import Text

from remoe.lab.text import lines

MEGABYTE = 1_000_000
SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_UPDATES = 0.1

Advance = Callable[[int], None]


class Console(console.Console):
    """Rich's console without its markup: text in square brackets or between colons, such as a name, is printed as is.

    Control characters, which a name may contain too, are escaped, so that they do not reach the terminal. A terminal
    gets lines that are broken between words; elsewhere each line stays whole.

    Raises:
        BrokenPipeError: from any output once nobody reads it, as `print` does; rich would end the process.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)
        self.soft_wrap = not self.is_terminal

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(lines(text), **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


def say(text: str) -> None:
    """Print a line to standard output: broken between words on a terminal, whole elsewhere."""
    Console().print(text)


def emit(text: str) -> None:
    """Write a piece of a text to standard output at once, with control characters escaped on a terminal."""
    sys.stdout.write(lines(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Reporter:
    """Log lines and progress on stderr: a bar on a terminal, an occasional line elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True)

    def line(self, text: str) -> None:
        """Write a line, unless quiet."""
        if not self.quiet:
            self.console.print(text)

    @contextmanager
    def task(self, title: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """Show the progress of one task; yields a function to call with the number of bytes just processed.

        `total` and `done` are in bytes; an earlier run processed `done` of them.
        """
        if self.quiet:
            yield lambda amount: None
        elif self.console.is_terminal:
            with self._bar(title, total, done) as advance:
                yield advance
        else:
            yield self._lines(title, total, done)

    @contextmanager
    def _bar(self, title: str, total: int | None, done: int) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, state="")
            yield _every(
                SECONDS_BETWEEN_UPDATES,  # an update costs more than a short document
                total,
                done,
                lambda finished, state: progress.update(task, completed=finished, state=state),
            )

    def _lines(self, title: str, total: int | None, done: int) -> Advance:
        return _every(SECONDS_BETWEEN_LINES, total, done, lambda finished, state: self.line(f"{title}: {state}"))


def duration(seconds: float) -> str:
    """`0:07` or `12:34`; with hours, `3:05:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _every(interval: float, total: int | None, done: int, show: Callable[[int, str], object]) -> Advance:
    """A function that adds up bytes, and every `interval` seconds shows their sum and the progress in words."""
    start = last = time.monotonic()
    finished = done

    def advance(amount: int) -> None:
        nonlocal finished, last
        finished += amount
        now = time.monotonic()
        if now - last >= interval:
            last = now
            show(finished, _state(finished, total, finished - done, now - start))

    return advance


def _state(done: int, total: int | None, recent: int, seconds: float) -> str:
    """Megabytes done, the total, and MB/s; `recent` bytes were processed in `seconds`."""
    share = f" of {total / MEGABYTE:.1f}" if total is not None else ""
    return f"{done / MEGABYTE:.1f}{share} MB, {recent / MEGABYTE / max(seconds, 1e-9):.1f} MB/s"
