"""Progress of a training run: a line every few steps, and on a terminal a bar that moves with every step."""

import sys
from collections import deque

from rich.progress import BarColumn, Progress, TextColumn

from remoe.lab.console import Console, duration
from remoe.lab.training.config import TrainConfig
from remoe.routing import ROUTERS


class ProgressLine:
    """Prints `step, loss, lambda, sparsity, stage, tokens/s, time left`; lambda only when it controls the router.

    The loss is the language model's alone, without the router's penalties, so that it is comparable between routers.

    Args:
        config: options of the run.
        first_step: steps already done.
    """

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self._config = config
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._steps = 0
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            console=self._console,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=config.steps, completed=first_step)
        self._bar.start()

    def add(self, tokens: int, seconds: float) -> None:
        """Counts a step's tokens and its time in seconds, without validation and saving."""
        if self._steps == 1:  # the first step is slower: it allocates memory and compiles kernels
            self._recent.clear()
        self._steps += 1
        self._recent.append((tokens, seconds))

    def show(self, record: dict, step: int) -> None:
        """Shows a step's record.

        Raises:
            OSError: when the output takes no more, e.g. BrokenPipeError when its reader has closed it.
        """
        line = self._line(record, step)
        self._bar.update(self._task, completed=step, description=line)
        if step == 1 or step % self._config.print_every == 0 or step == self._config.steps:
            self._console.print(line)
        if "validation_loss" in record:
            per_domain = record["validation_loss_per_domain"].items()
            domains = "  ".join(f"{domain} {loss:.3f}" for domain, loss in per_domain)
            self._console.print(f"          validation loss {record['validation_loss']:.4f}   ({domains})")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()

    def _line(self, record: dict, step: int) -> str:
        tokens = sum(tokens for tokens, _ in self._recent)
        seconds = sum(seconds for _, seconds in self._recent)
        left = (self._config.steps - step) * seconds / len(self._recent)
        steered = f"lambda {record['lambda']:.2e}  " if ROUTERS[self._config.router].steered else ""
        return (
            f"step {step:>6}/{self._config.steps}  loss {record['lm_loss']:.4f}  {steered}"
            f"sparsity {record['sparsity']:.4f}  {record['stage']:<11}  "
            f"{tokens / seconds:>7,.0f} tokens/s" + (f"  left {duration(left)}" if self._steps > 1 else "")
        )
