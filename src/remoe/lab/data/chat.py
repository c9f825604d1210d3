"""Conversations as tokens, by the chat template of a tokenizer, with the answers marked.

Shape suffixes: S tokens of a conversation.
"""

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from remoe.errors import DataError
from remoe.lab.data.documents import ANSWERS
from remoe.lab.text import short_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"{%-?\s*generation\b")  # in a template that itself marks the answers


class ChatEncoder:
    """Encodes conversations by the chat template of a tokenizer.

    Where the template has no `{% generation %}` marks, an answer is what one more message adds to the text of the
    messages before it and of the start of an answer.

    Raises:
        DataError: for a tokenizer without a template, or without a Rust core, which tells where a token is in the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise DataError("--chat needs a tokenizer with one chat template, and this one has none")
        if not tokenizer.is_fast:
            raise DataError("--chat needs a fast tokenizer, one with a tokenizer.json")
        self._tokenizer, self._marked = tokenizer, _MARKED.search(template) is not None

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Encodes a conversation, JSON text as `remoe.lab.data.documents.conversation` returns it.

        Returns:
            Token ids including EOS, int64 (S); 1 for those of answers, uint8 (S); UTF-8 bytes of the answers.

        Raises:
            DataError: when the template refuses the conversation, or the answers cannot be told apart.
        """
        messages: list[dict[str, Any]] = json.loads(text)
        try:
            ids, targets = self._by_marks(messages) if self._marked else self._by_prefixes(messages)
        except DataError:
            raise
        except Exception as error:  # templates raise errors of their own
            raise self._error(messages, " ".join(str(error).split())) from error
        if not targets.any():
            raise self._error(messages, "it leaves no token of an answer")
        if ids[-1] != (eos := self._tokenizer.eos_token_id):
            ids, targets = np.append(ids, eos), np.append(targets, targets[-1])
        size = sum(len(message["content"].encode()) for message in messages if message["role"] == ANSWERS)
        return ids, targets, size

    def _by_marks(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._tokenizer.apply_chat_template(messages, **options)
        return np.array(encoded["input_ids"], np.int64), np.array(encoded["assistant_masks"], np.uint8)

    def _by_prefixes(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        whole = self._render(messages)
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        start_S, end_S = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        targets = np.zeros(len(start_S), np.uint8)
        for number, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            through = self._render(messages[: number + 1])
            if not (through.startswith(before) and whole.startswith(through)):
                raise self._error(messages, "it writes earlier messages in another way when later ones follow")
            targets[(end_S > len(before)) & (end_S <= len(through)) & (end_S > start_S)] = 1
        return np.array(encoded["input_ids"], np.int64), targets

    def _render(self, messages: list[dict[str, Any]], **options: bool) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)

    @staticmethod
    def _error(messages: list[dict[str, Any]], reason: str) -> DataError:
        start = short_name(messages[0]["content"])
        return DataError(f"the tokenizer's chat template cannot be used for the conversation {start!r}: {reason}")
