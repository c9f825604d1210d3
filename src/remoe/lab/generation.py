"""Text from a trained model."""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remoe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

LONGEST_PROMPT = 16_384  # tokens, for models of shorter sequences; attention over ten times as many takes minutes
LONGEST_TEXT = 1_000_000  # tokens
MANY_TOKENS = 2_000  # more take so long that a line says what is being done


@dataclass
class SamplingOptions:
    """How the next token is chosen."""

    max_new_tokens: int = 120
    """The most tokens to write; there are fewer when the model ends its text."""
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


def check_length(
    model: "PreTrainedModel", prompt_tokens: int, new_tokens: int, option: str = "--max-new-tokens"
) -> bool:
    """Whether prompt and text may be longer than the sequences of training, which a model of ours allows.

    Args:
        model: that will write the text.
        prompt_tokens: length of the prompt.
        new_tokens: the most tokens that will be written.
        option: name of the option that sets new_tokens.

    Raises:
        ConfigError: for a prompt longer than the model's longest sequence and LONGEST_PROMPT, or, for a model that is
            not ours, more tokens than that sequence.
    """
    from remoe.models.modeling_remoe import RemoeForCausalLM

    context = getattr(model.config, "max_position_embeddings", None)  # not every transformers model has one
    if prompt_tokens > (longest := max(context or 0, LONGEST_PROMPT)):
        raise ConfigError(f"the prompt has {prompt_tokens:,} tokens; this model takes at most {longest:,}")
    beyond = context is not None and prompt_tokens + new_tokens > context
    if beyond and not isinstance(model, RemoeForCausalLM):  # it may have no positions beyond
        raise ConfigError(
            f"prompt and text may exceed {context} tokens, the most that this model takes: lower {option}"
        )
    return beyond


def generate_text(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, options: SamplingOptions
) -> str:
    """The text that the model writes after `prompt`.

    Args:
        model: put into evaluation mode, and afterwards into the mode that it was in.
        tokenizer: the model's own.
        prompt: the start of the text; an empty prompt starts a new document.
        options: sampling.

    Returns:
        The continuation, without the prompt.

    Raises:
        ConfigError: for sampling options out of range, a prompt that is not valid Unicode or longer than the model's
            longest sequence and LONGEST_PROMPT, or, for a model that is not ours, more tokens than that sequence or a
            gate threshold or cap.
    """
    import torch  # not at the top: the command line's help must not wait for it

    from remoe.lab.data.tokenizer import vocabulary_size
    from remoe.models.modeling_remoe import RemoeForCausalLM
    from remoe.models.modes import evaluating

    options.check()
    check_prompt(prompt)
    # Our training data has none of the special tokens that a tokenizer puts around a text; other models may need them.
    special = not isinstance(model, RemoeForCausalLM)
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"] or [tokenizer.eos_token_id]
    input_ids = torch.tensor([ids], device=model.device)
    if options.max_new_tokens > MANY_TOKENS:
        logger.warning("writing up to %d tokens, which takes a while", options.max_new_tokens)
    if check_length(model, len(ids), options.max_new_tokens):
        longest = model.config.max_position_embeddings
        logger.warning("prompt and text may exceed %d tokens, the longest sequence seen in training", longest)
    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    known, size = vocabulary_size(tokenizer), model.get_output_embeddings().weight.shape[0]
    if known < size:  # a vocabulary that is rounded up: these ids have no text
        sampling["suppress_tokens"] = list(range(known, size))
    dial = {"gate_threshold": options.gate_threshold, "max_experts": options.max_experts}
    dial = {name: value for name, value in dial.items() if value is not None}
    if dial and not isinstance(model, RemoeForCausalLM):
        raise ConfigError("--gate-threshold and --max-experts need a model of remoe's own type")
    devices = [model.device] if model.device.type == "cuda" else []
    # A sample must not disturb the random numbers of a training run.
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(options.seed)
        output_ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
            **dial,
        )
    written = output_ids[0].tolist()
    whole, start = (tokenizer.decode(part, skip_special_tokens=True) for part in (written, ids))
    if whole.startswith(start):  # some decoders drop a space that begins a text
        return whole[len(start) :]
    return tokenizer.decode(written[len(ids) :], skip_special_tokens=True)  # a character of both
