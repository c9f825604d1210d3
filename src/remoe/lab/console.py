"""Rich's console, for which a closed output is an error as it is for `print`; rich itself would end the process."""

from typing import Any

from rich import console


class Console(console.Console):
    """As rich's, but for its markup: what stands in square brackets or between colons is text, of a name for instance.

    Raises:
        BrokenPipeError: from any output, when nobody reads it any more.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False} | options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, or from an hour on `3:05:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
