"""Conversations as prompts, by the chat template of a tokenizer."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from remoe.errors import ConfigError
from remoe.lab.data.documents import ANSWERS
from remoe.lab.generation.options import check_prompt
from remoe.lab.generation.stream import Ending

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # `role` and `content`
SYSTEM, USER = "system", "user"
_ANSWER, _NEXT = "qanswerq", "qquestionq"  # words that no template writes


class ChatTemplate:
    """Makes prompts of conversations, after which a model writes the next answer.

    Args:
        tokenizer: the model's.

    Raises:
        ConfigError: for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError("--chat needs a tokenizer with a chat template, and this model's has none") from error
        self._tokenizer = tokenizer

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation and of the beginning of an answer.

        Raises:
            ConfigError: when the template refuses the conversation.
        """
        try:
            text = self._render(messages, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of their own
            reason = " ".join(str(error).split())
            raise ConfigError(f"the tokenizer's chat template refuses the conversation: {reason}") from error
        return self._ids(text)

    def fit(self, messages: Sequence[Message], longest: int) -> tuple[list[Message], int]:
        """The conversation without its oldest turns, so that it has at most `longest` tokens if that is possible.

        A system message at its beginning and the last question always stay.

        Args:
            messages: ending with a question.
            longest: tokens.

        Returns:
            The messages that are left, and the number of turns that are not: questions with their answers.

        Raises:
            ConfigError: when the template refuses the conversation.
        """
        fixed = [message for message in messages[:1] if message["role"] == SYSTEM]
        turns: list[list[Message]] = []
        for message in messages[len(fixed) :]:
            if message["role"] == USER or not turns:
                turns.append([])
            turns[-1].append(message)
        whole, left_out = list(messages), 0
        while left_out < len(turns) - 1 and len(self.encode(whole)) > longest:
            left_out += 1
            whole = fixed + [message for turn in turns[left_out:] for message in turn]
        return whole, left_out

    @cached_property
    def ending(self) -> Ending:
        """What follows an answer where the conversation goes on: its first special token, or else its text."""
        asked, answer, following = (
            {"role": USER, "content": _NEXT.upper()},
            {"role": ANSWERS, "content": _ANSWER},
            {"role": USER, "content": _NEXT},
        )
        try:
            text = self._render([asked, answer, following])
        except Exception:  # a template for a single question: the model's own end of text must do
            return Ending()
        text = text.partition(_ANSWER)[2].partition(_NEXT)[0]
        special = set(self._tokenizer.all_special_ids)
        if marks := [token for token in self._ids(text) if token in special]:
            return Ending(ids=frozenset(marks[:1]))
        return Ending(text=text if text.strip() else "")  # white space alone may be in an answer

    def _ids(self, text: str) -> list[int]:
        check_prompt(text)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
