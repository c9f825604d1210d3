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
