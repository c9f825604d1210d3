"""SIGINT, SIGTERM and a closed output as a request to stop after the current step; a second signal stops at once."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

SIGPIPE = 13  # as signal.SIGPIPE, which some systems do not have


class Interrupt:
    """Context in which the first SIGINT or SIGTERM only sets `received` to the signal's number.

    Args:
        answer: a line to write to standard error when that happens.
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
        """Handles a BrokenPipeError of standard output: sets `received`, and discards all further output."""
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
    """The exit code of a process that a signal ended, as shells report it."""
    return 128 + number


def discard_output() -> None:
    """Discards further output and what is still buffered, which Python would otherwise try to write when it exits."""
    with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError, ValueError):  # the output may not be a file
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
