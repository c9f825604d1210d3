"""What ends a run on several ranks: each rank's last words in the run's `ranks.log`, and one line for the user."""

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from remoe.errors import RemoeError
from remoe.lab.training.interrupt import exit_code
from remoe.lab.training.ranks import RankFailed, Ranks
from remoe.lab.training.words import log_path, take_over, write_words

_TIMED_OUT = ("Timed out", "timed out", "timeout", "Timeout")
_LOST = (*_TIMED_OUT, "Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")
_MODULES = ("distributed_c10d.py", "_functional_collectives.py")  # of torch.distributed, which have its collectives
_PATIENCE = {True: 10.0, False: 1.0}  # seconds in which other ranks report, after a time-out and otherwise
_WAITS, _FAILED = b"waits", b"failed"


@contextmanager
def last_words(ranks: Ranks, folder: Path | None) -> Iterator[None]:
    """Context of a run's work. On several ranks, an error in it goes to `ranks.log`, and one rank prints it.

    A collective that fails because another rank hangs or has ended becomes a RemoeError that names rank, step and
    collective, on the lowest rank that waits. The other ranks exit with code 2.

    Args:
        ranks: those that train the model.
        folder: the run's; None where another run is in its place, whose log gets no words.
    """
    take_over()
    if ranks.count == 1:
        yield
        return
    try:
        yield
    except RankFailed as error:
        _finish()
        _write(folder, ranks, str(error))
        raise SystemExit(2) from error
    except Exception as error:
        _finish()
        if isinstance(error, RemoeError) or not is_lost(error):
            words = str(error) if isinstance(error, RemoeError) else repr(error)
            _write(folder, ranks, words)
            report = _FAILED + words.encode()
            if (_report(ranks, report, 0 if ranks.first else _PATIENCE[False]) or {}).get(0) == report and ranks.rank:
                raise SystemExit(2) from error  # rank 0 prints the same
            raise
        timed_out, collective = any(word in str(error) for word in _TIMED_OUT), collective_of(error)
        reason = f"no answer in {ranks.timeout:,} s" if timed_out else "lost contact with another rank"
        _write(folder, ranks, f"waited in {collective}: {reason}")
        lost = _lost(ranks, collective, timed_out)
        if isinstance(lost, RemoeError):
            _write(folder, ranks, str(lost).removeprefix(f"step {ranks.step}: "))
        raise lost from error
    except BaseException as error:
        _write(folder, ranks, f"ended by {error!r}")
        raise


def _finish() -> None:
    """From here on this process ends by itself: torchrun's SIGTERM, when another has ended, must not cut it short."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_stop(folder: Path, ranks: Ranks, number: int) -> None:
    """Writes into `ranks.log` that a signal stopped the run and its state is saved; nothing on a single process."""
    if ranks.count > 1:
        _write(folder, ranks, f"stopped by signal {number}, saved; exit code {exit_code(number)}")


def is_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank did not take part in it."""
    distributed = isinstance(error, dist.DistError) or any(
        frame.filename.endswith(_MODULES) or "/torch/distributed/" in frame.filename
        for frame in traceback.extract_tb(error.__traceback__)
    )
    return isinstance(error, RuntimeError) and distributed and any(word in str(error) for word in _LOST)


def collective_of(error: Exception) -> str:
    """The collective in which an error was raised; where torch does not show it, the function that was waiting."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [f.name for f in frames if f.filename.endswith(_MODULES) and not f.name.startswith(("_", "wrapper"))]
    return names[0] if names else frames[-1].name


def _lost(ranks: Ranks, collective: str, timed_out: bool) -> BaseException:
    """The error for this rank, which waited in vain: the line, or an exit when another rank prints it."""
    reports = _report(ranks, _WAITS, _PATIENCE[timed_out])
    if reports is None:
        return RemoeError(f"step {ranks.step}: {collective} failed, and the other ranks cannot be asked why")
    waiting = [rank for rank, report in reports.items() if report == _WAITS]
    if len(waiting) < len(reports) or waiting[0] != ranks.rank:
        return SystemExit(2)
    missing = [rank for rank in range(ranks.count) if rank not in reports]
    who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    if not missing:
        why = "all ranks wait: the network failed, or they wait for different things"
    elif timed_out:
        why = f"{who} did not take part within {ranks.timeout:,} s (--mesh-timeout)"
    else:
        why = f"{who} has ended"
    return RemoeError(f"step {ranks.step}: {collective} failed: {why}; continue with --resume")


def _report(ranks: Ranks, report: bytes, patience: float = 0.0) -> dict[int, bytes] | None:
    """Tells the other ranks how this one ended; returns what those have told that do so soon, or None if it cannot."""
    try:
        store = dist.PrefixStore("last words", dist.distributed_c10d._get_default_store())
        store.set(str(ranks.rank), report)
        until = time.monotonic() + patience
        while True:
            told = [rank for rank in range(ranks.count) if store.check([str(rank)])]
            if len(told) == ranks.count or time.monotonic() >= until:
                return {rank: store.get(str(rank)) for rank in told}
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # the store was in a process that has ended
        return None


def _write(folder: Path | None, ranks: Ranks, words: str) -> None:
    if folder is not None:
        write_words(log_path(folder), ranks.rank, ranks.count, ranks.step, words)
