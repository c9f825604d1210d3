"""Rich's console, for which a closed output is an error as it is for `print`; rich itself would end the process."""

from rich import console


class Console(console.Console):
    """As rich's.

    Raises:
        BrokenPipeError: from any output, when nobody reads it any more.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError
