"""Progress of a training run: a line every few steps, and on a terminal a bar that moves with every step."""

import sys
from collections import deque

from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from remoe.lab.console import Console, duration
from remoe.lab.training.config import TrainConfig
from remoe.routing import ROUTERS

STAGES = {"dense": "magenta", "sparsifying": "yellow", "sparse": "green"}  # their colours
WIDTH_WITH_BAR = 140


class ProgressLine:
    """Prints `step, loss, lambda, sparsity, stage, tokens/s, time left`; lambda only when it controls the router.

    A run on several processes also shows tokens/s of a device, MFU where it is known, and the share of the time in the
    exchange of tokens.

    The loss is the language model's alone, without the router's penalties, so that it is comparable between routers.

    Args:
        config: options of the run.
        first_step: steps already done.
    """

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self._config = config
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._steps = 0
        self._console = Console()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            *([BarColumn(bar_width=30)] if self._console.width >= WIDTH_WITH_BAR else []),
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
            shown = Text(line)
            shown.highlight_words([f"  {record['stage']} "], STAGES.get(record["stage"], ""))
            self._console.print(shown)
        if "validation_loss" in record:
            per_domain = record["validation_loss_per_domain"].items()
            domains = "  ".join(f"{domain} {loss:.3f}" for domain, loss in per_domain)
            self._console.print(f"          validation loss {record['validation_loss']:.4f}   ({domains})")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()

    def _line(self, record: dict, step: int) -> str:
        """The longest of three forms that fits a terminal; elsewhere always the longest."""
        tokens = sum(tokens for tokens, _ in self._recent)
        seconds = sum(seconds for _, seconds in self._recent)
        left = duration((self._config.steps - step) * seconds / len(self._recent))
        some_left = self._steps > 1  # otherwise the speed is not known yet
        steps, steered = self._config.steps, ROUTERS[self._config.router].steered
        loss, sparsity, speed = record["lm_loss"], record["sparsity"], tokens / seconds
        stage = f"  {record['stage']:<11}  "
        line = (
            (f"step {step:>6}/{steps}  loss {loss:.4f}" + f"  lambda {record['lambda']:.2e}" * steered)
            + f"  sparsity {sparsity:.4f}{stage}{speed:>7,.0f} tokens/s{_of_devices(record, speed)}"
            + f"  left {left}" * some_left
        )
        if not self._console.is_terminal or len(line) <= self._console.width:
            return line
        short = (
            f"{step:>{len(str(steps))}}/{steps}  loss {loss:.4f}" + f"  lambda {record['lambda']:.1e}" * steered
        ) + f"  S {sparsity:.4f}{stage}"
        line = f"{short}{speed:,.0f} tok/s" + f"  {left}" * some_left
        return line if len(line) <= self._console.width else short + left * some_left


def _of_devices(record: dict, speed: float) -> str:
    """What a record says of each device of several; `speed` is the mean of all, in tokens per second."""
    text = ""
    if "tokens_per_second_per_device" in record:
        per_device = speed * record["tokens_per_second_per_device"] / record["tokens_per_second"]
        text += f" ({per_device:,.0f} per device)"
    if "mfu" in record:
        text += f"  MFU {record['mfu']:.1%}"
    if "exchange_share" in record:
        text += f"  exchange {record['exchange_share']:.0%}"
    return text
