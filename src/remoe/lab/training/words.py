"""The last words of the processes of a run in `ranks.log`, from the moment at which they start.

Imports nothing but Python's own modules: a package that cannot be imported is one of the reasons why a process ends.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

LOG = "ranks.log"
_RUNS = Path("runs")
_started: list[Path] = []  # where this process writes, until `last_words` of `faults.py` takes over


def log_path(run: Path) -> Path:
    """RUN/ranks.log, or RUN-ranks.log beside it while there is no such folder: a new run needs its folder to be new."""
    return run / LOG if run.is_dir() else run.with_name(f"{run.name}-{LOG}")


def write_words(log: Path, rank: int, count: int, step: int, words: str) -> None:
    """Appends a line; nothing where the disk is full."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = f"{now} rank {rank} of {count}, step {step}: {' '.join(words.split())}\n"
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(line)


@contextmanager
def early_words(argv: list[str]) -> Iterator[None]:
    """Context of `remoe train`: on several processes, what ends this one before `last_words` begins is written.

    Args:
        argv: the command's arguments, perhaps wrong ones.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    _started.append(_early_log(argv))
    try:
        yield
    except BaseException as error:
        ended_early(f"ended by {error!r}" if isinstance(error, SystemExit) else str(error) or repr(error))
        raise
    finally:
        _started.clear()


def ended_early(words: str) -> None:
    """Writes why this process ends, if it is one of several that has not come to `last_words`."""
    if _started:
        rank, count = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE"))
        write_words(_started.pop(), rank, count, 0, f"before the run began: {words}")


def take_over() -> None:
    """From here on, `last_words` writes."""
    _started.clear()


def _early_log(argv: list[str]) -> Path:
    """The log of the run that the arguments name; beside its folder where an older run is in it."""
    run = _RUNS
    for i, argument in enumerate(argv):
        if argument == "--out" and i + 1 < len(argv):
            run = Path(argv[i + 1])
        elif argument.startswith("--out="):
            run = Path(argument.removeprefix("--out="))
    continued = "--resume" in argv or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if (run / "config.yaml").exists() and not continued:
        return run.with_name(f"{run.name}-{LOG}")
    return log_path(run)
