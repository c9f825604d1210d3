"""transformers shows a progress bar for every file it reads or writes; a command shows its own."""


def quiet_transformers() -> None:
    """Turns those bars off for this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
