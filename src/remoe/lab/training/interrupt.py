"""SIGINT, SIGTERM and a closed output as a request to stop after the present step; a second signal stops at once."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

SIGPIPE = 13  # signal.SIGPIPE, which not every system has


class Interrupt:
    """Context in which the first SIGINT or SIGTERM only sets `received`, to the signal's number.

    Args:
        answer: a line that is written to standard error then.
    """

    def __init__(self, answer: str = "") -> None:
        self.received: int | None = None
        self._answer = answer
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def output_closed(self) -> None:
        """What a BrokenPipeError of standard output calls for: as a signal, and nothing is printed any more."""
        self.received = self.received or SIGPIPE
        discard_output()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._answer:
            os.write(2, f"\n{self._answer}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def exit_code(number: int) -> int:
    """A process's exit code after a signal, as shells have it."""
    return 128 + number


def discard_output() -> None:
    """Throws away what is printed from now on, and what waits to be written: Python writes the rest when it ends."""
    with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError, ValueError):  # some output is no file
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
