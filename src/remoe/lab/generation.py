"""Text from a trained model."""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remoe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass
class SamplingOptions:
    """How the next token is chosen."""

    max_new_tokens: int = 120
    """Tokens to write at the most; fewer when the model ends its text."""
    temperature: float = 0.8
    """Sharpness: 0 always takes the likeliest token, 1 samples from the model as it is."""
    top_k: int = 50
    """Sample from the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens already written become less likely."""
    seed: int = 0
    """Seed of the random numbers: the same seed writes the same text."""

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1, but is {self.max_new_tokens}")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf) or not 0 < self.top_p <= 1:
            raise ConfigError("need temperature 0 or from 0.001, and 0 < top-p <= 1")
        if self.top_k < 0 or not 0 < self.repetition_penalty < math.inf:
            raise ConfigError("need top-k >= 0 and repetition-penalty > 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be from 0 to 2**63 - 1, but is {self.seed}")


def check_prompt(prompt: str) -> None:
    """Raises ConfigError for a prompt that is not valid Unicode, as broken bytes on a command line give."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8 text: {error}") from error


def generate_text(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, options: SamplingOptions
) -> str:
    """The text that the model writes after `prompt`, with its KV cache.

    Args:
        model: used in eval mode.
        tokenizer: the model's own.
        prompt: where to start; the empty prompt starts a new document.
        options: sampling.

    Returns:
        The continuation, without the prompt.

    Raises:
        ConfigError: for sampling options out of range, a prompt that is not text, or more of both than a model of
            others takes.
    """
    import torch  # here, so that the command line can show the options' help at once

    from remoe.models.modeling_remoe import RemoeForCausalLM

    options.check()
    check_prompt(prompt)
    # Our training data has no tokens that a tokenizer puts around a text; models of others may need them.
    special = not isinstance(model, RemoeForCausalLM)
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"] or [tokenizer.eos_token_id]
    input_ids = torch.tensor([ids], device=model.device)
    context = getattr(model.config, "max_position_embeddings", None)  # not every transformers model has one
    if context is not None and len(ids) + options.max_new_tokens > context:
        if not isinstance(model, RemoeForCausalLM):  # its positions may end there
            raise ConfigError(
                f"prompt and text may pass {context} tokens, the longest sequence of this model: lower --max-new-tokens"
            )
        logger.warning("prompt and text may pass %d tokens, the longest sequence the model was trained on", context)
    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # a sample must not disturb a training run's random numbers
        torch.manual_seed(options.seed)
        output_ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    model.train(was_training)
    written = output_ids[0].tolist()
    whole, start = (tokenizer.decode(part, skip_special_tokens=True) for part in (written, ids))
    if whole.startswith(start):  # some decoders drop a space that begins a text
        return whole[len(start) :]
    return tokenizer.decode(written[len(ids) :], skip_special_tokens=True)  # a character of both
