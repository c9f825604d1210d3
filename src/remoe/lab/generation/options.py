"""How text is sampled."""

import math
from dataclasses import dataclass

from remoe.errors import ConfigError

LONGEST_TEXT = 1_000_000  # tokens


@dataclass
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8
    """0 always takes the most likely token, 1 samples from the model's own distribution."""
    top_k: int = 50
    """Sample only from the k most likely tokens; 0 for all tokens."""
    top_p: float = 1.0
    """Sample only from the most likely tokens that together have this probability; 1 for all tokens."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that were already written less likely."""
    seed: int = 0
    """Random seed: the same seed gives the same text."""
    gate_threshold: float | None = None
    """Leave out experts whose gate is at most this: less compute, a higher loss."""
    max_experts: int | None = None
    """Execute at most so many experts per token, those with the largest gates."""


@dataclass
class SamplingOptions(Sampling):
    """How a text is written."""

    max_new_tokens: int = 120
    """The most tokens to write; there are fewer when the model ends its text."""

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        if not 1 <= self.max_new_tokens <= LONGEST_TEXT:
            raise ConfigError(f"--max-new-tokens must be from 1 to {LONGEST_TEXT:,}, but is {self.max_new_tokens}")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf) or not 0 < self.top_p <= 1:
            raise ConfigError("--temperature must be 0 or at least 0.001, and --top-p above 0 and at most 1")
        if self.top_k < 0 or not 1e-3 <= self.repetition_penalty < math.inf:
            raise ConfigError("--top-k must be at least 0, and --repetition-penalty at least 0.001")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be from 0 to 2**63 - 1, but is {self.seed}")
        if self.gate_threshold is not None and not self.gate_threshold >= 0:
            raise ConfigError(f"--gate-threshold must be at least 0, but is {self.gate_threshold}")
        if self.max_experts is not None and self.max_experts < 1:
            raise ConfigError(f"--max-experts must be at least 1, but is {self.max_experts}")


def check_prompt(prompt: str) -> None:
    """Raises ConfigError for a prompt that is not valid Unicode, as broken bytes on a command line are."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8 text: {error}") from error
