"""The text of tokens while they are written, and where it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # decoded from bytes that are not a character


@dataclass(frozen=True)
class Ending:
    """What ends a text beside the tokens that end any text of the model.

    Attributes:
        ids: tokens.
        text: ends it too, and is not part of it; empty for none.
    """

    ids: frozenset[int] = frozenset()
    text: str = ""


class TextStream:
    """The text that tokens add after a prompt, one token after the other.

    A piece of text is held back for as long as the next token may change it: while it ends within a character, or may
    be the beginning of the text that ends it.

    Args:
        tokenizer: the model's.
        prompt: token ids before the text.
        end: text that ends it, and is not part of it; empty for none.

    Attributes:
        ended: whether `end` has come.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], end: str = "") -> None:
        self.ended = False
        self._tokenizer, self._end, self._held = tokenizer, end, ""
        self._special = set(tokenizer.all_special_ids)  # they have no text
        # Each piece is decoded after the one before it, because some decoders drop a space at the start of a text.
        self._before = [token for token in prompt if token not in self._special]
        self._known = self._decode(self._before)
        self._pending: list[int] = []

    def put(self, token: int) -> str:
        """The text that is certain with this token; empty after `ended`."""
        if self.ended or token in self._special:
            return ""
        self._pending.append(token)
        piece = self._piece()
        if piece.endswith(REPLACEMENT):
            return ""
        self._before, self._pending = self._pending, []
        self._known = self._decode(self._before)
        return self._release(piece)

    def finish(self) -> str:
        """The rest of the text, where no token follows."""
        if self.ended:
            return ""
        piece = self._release(self._piece() if self._pending else "")
        held, self._held, self._pending = self._held, "", []
        return piece if self.ended else piece + held

    def _piece(self) -> str:
        whole = self._decode(self._before + self._pending)
        if whole.startswith(self._known):
            return whole[len(self._known) :]
        return self._decode(self._pending)  # a character of both

    def _release(self, piece: str) -> str:
        if not self._end:
            return piece
        text = self._held + piece
        if (found := text.find(self._end)) >= 0:
            self.ended, self._held = True, ""
            return text[:found]
        longest = min(len(self._end) - 1, len(text))
        kept = next(n for n in range(longest, -1, -1) if text.endswith(self._end[:n]))
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
