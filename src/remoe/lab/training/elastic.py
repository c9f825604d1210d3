"""`torchrun --max-restarts N`: processes that it restarts continue the run that their predecessors began.

They are started by the same command, without `--resume`. So the run's folder has the name of the torchrun that began
it: only processes that the same torchrun has restarted continue a run in this way.
"""

import os
import socket

from remoe.errors import check
from remoe.lab.training.folder import RunFolder


def launch() -> str | None:
    """The name of the torchrun that started this process; None unless it restarts processes.

    Raises:
        ConfigError: when it has none, on several machines.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    check(alone, "torchrun --max-restarts on several machines needs --rdzv-id, a new name for every start")
    return f"{socket.gethostname()} {os.getppid()}"


def check_launch(out: str | None) -> None:
    """Raises ConfigError when torchrun would restart processes that could not find their run."""
    check(
        out is not None or launch() is None,
        "torchrun --max-restarts needs --out RUN: restarted processes continue the run in that folder",
    )


def is_restarted(run: RunFolder) -> bool:
    """Whether torchrun has restarted this process to continue this run."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return restarted and run.launch.is_file() and run.launch.read_text() == launch()
