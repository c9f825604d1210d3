"""Texts that a model writes after prompts, many at a time, token by token.

Legend: B prompts of a batch, S sequence length, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import LogitsProcessor

from remoe.errors import ConfigError
from remoe.lab.data.tokenizer import vocabulary_size
from remoe.lab.generation.options import SamplingOptions, check_prompt
from remoe.lab.generation.stream import Ending, TextStream
from remoe.models import routed
from remoe.models.context import longest_sequence
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating

logger = logging.getLogger(__name__)

LONGEST_PROMPT = 16_384  # tokens, for models of shorter sequences; attention over ten times as many takes minutes
MANY_TOKENS = 2_000  # more take so long that a line says what is being done


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        ids: its tokens.
        ending: what ends the text beside the tokens that end any text of the model.
    """

    ids: list[int]
    ending: Ending = field(default_factory=Ending)


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
        text: without the prompt.
        tokens: their number, that which ended the text included.
        ended: whether the model ended the text itself.
    """

    text: str
    tokens: int
    ended: bool


Write = Callable[[int, str, bool], object]  # takes the prompt's number, a piece of its text, and whether it is the last


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: SamplingOptions
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
        ConfigError: as `write_texts`, and for a prompt that is not valid Unicode.
    """
    request = Request(prompt_ids(model, tokenizer, prompt))
    (written,) = write_texts(model, tokenizer, [request], options)
    return written.text


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: SamplingOptions,
    watch: StoppingCriteria,
    **more: object,
) -> tuple[list[int], int]:
    """Token ids of a prompt and of what the model writes after it.

    Args:
        model, tokenizer, prompt, options: as in `generate_text`.
        watch: called after each token.
        more: arguments of the model's `generate`.

    Returns:
        The ids, and how many of them are the prompt's.

    Raises:
        ConfigError: as `generate_text`.
    """
    ids = prompt_ids(model, tokenizer, prompt)
    settings = _settings(model, tokenizer, [len(ids)], options) | more
    row = _Row(0, Request(ids), tokenizer, settings["eos_token_id"], lambda *_: None)
    (written_S,) = _write_batch(model, [row], settings, options, [watch])
    return written_S, len(ids)


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one is the token that begins a new document.

    Raises:
        ConfigError: for a prompt that is not valid Unicode.
    """
    check_prompt(prompt)
    # Our training data has none of the special tokens that a tokenizer puts around a text; other models may need them.
    special = not isinstance(model, RemoeForCausalLM)
    return tokenizer(prompt, add_special_tokens=special)["input_ids"] or [tokenizer.eos_token_id]


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    options: SamplingOptions,
    *,
    batch_size: int = 1,
    write: Write = lambda number, piece, last: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Written]:
    """The texts that the model writes after prompts, in their order.

    A text depends on its own prompt, the options and the seed, not on the prompts that it shares a batch with, as far
    as the rounding of sums in another order leaves the same token the most likely one.

    Args:
        model: put into evaluation mode for each batch, and afterwards into the mode that it was in.
        tokenizer: the model's own.
        requests: the prompts.
        options: sampling; each text is drawn with the seed.
        batch_size: prompts at a time, shorter ones padded on the left.
        write: called with a prompt's number, a piece of its text and whether that is the last, as soon as each token
            is there; texts of a batch come at the same time.
        stopped: asked after each token; where it holds, the texts of the batch stay as they are, and no more follow.

    Yields:
        The text of each prompt, when its batch is done.

    Raises:
        ConfigError: for sampling options out of range, a prompt that is longer than the model's longest sequence and
            LONGEST_PROMPT, or, for a model that is not ours, more tokens than that sequence or a gate threshold or
            cap.
    """
    settings = _settings(model, tokenizer, [len(request.ids) for request in requests], options)
    for start in range(0, len(requests), batch_size):
        rows = [
            _Row(number, request, tokenizer, settings["eos_token_id"], write)
            for number, request in enumerate(requests[start : start + batch_size], start)
        ]
        _write_batch(model, rows, settings, options, [_Stop(stopped)])
        yield from (Written(row.text, row.tokens, row.ended) for row in rows)
        if stopped():
            return


def check_dial(model: PreTrainedModel, options: SamplingOptions) -> None:
    """Raises ConfigError for a gate threshold or a cap with a model that has no gates to leave out."""
    if options.gate_threshold is not None or options.max_experts is not None:
        routed.check_dial(model)


def _check_lengths(model: PreTrainedModel, lengths: Sequence[int], options: SamplingOptions) -> None:
    """Raises ConfigError for a prompt that is too long, and warns of what takes long or is longer than in training."""
    most = max(lengths, default=0)
    which = "the prompt" if len(lengths) == 1 else f"prompt {lengths.index(most) + 1}"
    beyond = check_length(model, most, options.max_new_tokens, which=which)
    if options.max_new_tokens > MANY_TOKENS:
        logger.warning("writing up to %d tokens, which takes a while", options.max_new_tokens)
    if beyond:
        context = longest_sequence(model)
        logger.warning("prompt and text may exceed %d tokens, the longest sequence seen in training", context)


def check_length(
    model: PreTrainedModel,
    prompt_tokens: int,
    new_tokens: int,
    option: str = "--max-new-tokens",
    which: str = "the prompt",
) -> bool:
    """Whether prompt and text may be longer than the sequences of training, which a model of ours allows.

    Args:
        model: that will write the text.
        prompt_tokens: length of the prompt.
        new_tokens: the most tokens that will be written.
        option: name of the option that sets new_tokens.
        which: name of the prompt.

    Raises:
        ConfigError: for a prompt longer than the model's longest sequence and LONGEST_PROMPT, or, for a model that is
            not ours, more tokens than that sequence.
    """
    context = longest_sequence(model)
    if prompt_tokens > (longest := max(context or 0, LONGEST_PROMPT)):
        raise ConfigError(f"{which} has {prompt_tokens:,} tokens; this model takes at most {longest:,}")
    beyond = context is not None and prompt_tokens + new_tokens > context
    if beyond and not isinstance(model, RemoeForCausalLM):  # it may have no positions beyond
        raise ConfigError(
            f"prompt and text may exceed {context} tokens, the most that this model takes: lower {option}"
        )
    return beyond


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], options: SamplingOptions
) -> dict[str, Any]:
    """Arguments of `generate` that all batches share; raises ConfigError for options or prompts that do not go."""
    options.check()
    check_dial(model, options)
    _check_lengths(model, lengths, options)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "eos_token_id": sorted(ends | {tokenizer.eos_token_id}),
        "pad_token_id": tokenizer.eos_token_id,
        "do_sample": False,  # tokens are drawn by `_Draw`
        "num_beams": 1,
    }
    known, size = vocabulary_size(tokenizer), model.get_output_embeddings().weight.shape[0]
    if known < size:  # a vocabulary that is rounded up: these ids have no text
        settings["suppress_tokens"] = list(range(known, size))
    dial = {"gate_threshold": options.gate_threshold, "max_experts": options.max_experts}
    return settings | {name: value for name, value in dial.items() if value is not None}


class _Row:
    """A text that is being written."""

    def __init__(
        self, number: int, request: Request, tokenizer: PreTrainedTokenizerBase, ends: list[int], write: Write
    ) -> None:
        self.ids, self.ends = request.ids, request.ending.ids | set(ends)
        self.stream = TextStream(tokenizer, request.ids, request.ending.text)
        self.number, self.write = number, write
        self.tokens, self.ended, self.text = 0, False, ""

    def take(self, token: int) -> None:
        if self.ended:  # padding
            return
        self.tokens += 1
        ends = token in self.ends
        piece = self.stream.finish() if ends else self.stream.put(token)
        self.ended = ends or self.stream.ended
        self._add(piece, self.ended)

    def finish(self) -> None:
        if not self.ended:
            self._add(self.stream.finish(), True)

    def _add(self, piece: str, last: bool) -> None:
        self.text += piece
        if piece or last:
            self.write(self.number, piece, last)


def _write_batch(
    model: PreTrainedModel,
    rows: list[_Row],
    settings: dict[str, Any],
    options: SamplingOptions,
    criteria: Sequence[StoppingCriteria],
) -> list[list[int]]:
    """Writes the texts of the rows; returns their ids, with the padding and the prompts before them."""
    S = max(len(row.ids) for row in rows)
    padding = [S - len(row.ids) for row in rows]
    input_BS = [[settings["pad_token_id"]] * left + row.ids for left, row in zip(padding, rows, strict=True)]
    mask_BS = [[0] * left + [1] * (S - left) for left in padding]
    with evaluating(model):
        output_BS = model.generate(
            torch.tensor(input_BS, device=model.device),
            attention_mask=torch.tensor(mask_BS, device=model.device),
            logits_processor=[*_penalty(options, padding), *_sampling(options, len(rows), model.device)],
            stopping_criteria=[_Watch(rows), *criteria],
            **settings,
        )
    output = output_BS.tolist()
    for row, written in zip(rows, output, strict=True):
        for token in written[S + row.tokens :]:
            row.take(token)
        row.finish()
    return output


class _Watch(StoppingCriteria):
    """Passes each token on to its row; true for the rows whose text has ended."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)


class _Stop(StoppingCriteria):
    """True for all rows where `stopped` holds."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


def _penalty(options: SamplingOptions, padding: list[int]) -> list[LogitsProcessor]:
    return [] if options.repetition_penalty == 1 else [_Penalty(options.repetition_penalty, padding)]


class _Penalty(LogitsProcessor):
    """transformers' penalty of repetitions; before 5.24 its `generate` counts padding among a row's tokens."""

    def __init__(self, penalty: float, padding: list[int]) -> None:
        self.of_one, self.padding = RepetitionPenaltyLogitsProcessor(float(penalty)), padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = zip(input_ids.split(1), scores.split(1), self.padding, strict=True)
        return torch.cat([self.of_one(ids_1S[:, left:], row_1V) for ids_1S, row_1V, left in rows])


def _sampling(options: SamplingOptions, B: int, device: torch.device) -> list[LogitsProcessor]:
    """What makes the drawn token of each row the most likely one, in the order of transformers' own sampling."""
    if options.temperature == 0:
        return []
    steps: list[LogitsProcessor] = []
    if options.temperature != 1:
        steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k > 0:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    return [*steps, _Draw(options.seed, B, device)]


class _Draw(LogitsProcessor):
    """Draws a token for each row with a generator of its own, so that neither other rows nor a training run matter."""

    def __init__(self, seed: int, B: int, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for _ in range(B)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = zip(scores.softmax(dim=-1).split(1), self.generators, strict=True)
        token_B1 = torch.cat([torch.multinomial(probability_1V, 1, generator=own) for probability_1V, own in rows])
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)
