"""A signal or a closed output as a request to stop after the current step; a second signal stops at once."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

SIGPIPE = 13  # as signal.SIGPIPE, which some systems do not have
# Of a user, of the system, and of a terminal that is closed; some systems do not have the last.
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupt:
    """Context in which the first SIGINT, SIGTERM or SIGHUP only sets `received` to the signal's number.

    A SIGHUP that the process ignores, as it does under nohup, stays ignored.

    Args:
        answer: a line to write to standard error when that happens.
    """

    def __init__(self, answer: str = "") -> None:
        self.received: int | None = None
        self._answer = answer
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in ENDS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def output_closed(self) -> None:
        """Handles an output that takes no more: sets `received`, and discards all further output."""
        self.received = self.received or SIGPIPE
        discard_output()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._answer:
            try:
                os.write(2, f"\n{self._answer}\n".encode())
            except OSError:  # the terminal is closed
                discard_output("stdout", "stderr")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended, as shells report it."""
    return 128 + number


def discard_output(*names: str) -> None:
    """Discards further output and what is still buffered, which Python would otherwise try to write when it exits.

    Args:
        names: of the streams; "stdout" by default.
    """
    for name in names or ("stdout",):
        with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError, ValueError):  # it may not be a file
            os.dup2(nowhere.fileno(), getattr(sys, name).fileno())
