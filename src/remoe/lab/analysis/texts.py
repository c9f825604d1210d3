"""Text for a model to read: prepared data, files, or a prompt; and the text of each token.

Legend: N sequences, S sequence length.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.lab.data import Document, ValidationWindows
from remoe.lab.data.batches import IGNORED_TARGET, windows_of
from remoe.lab.data.tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # decoded from bytes that are not a character
CHARACTER_TOKENS = 8  # more than enough for a character, which has at most four bytes
CACHED = 1 << 16  # pieces of text
PROMPT, GIVEN = "prompt", "tokens"  # names of their domains


class Batch(NamedTuple):
    """Sequences of one domain: inputs, targets (int64) and mask (bool), (N, S) each, as `windows_of` makes them."""

    domain: str
    input_NS: Tensor
    target_NS: Tensor
    mask_NS: Tensor


class Text(Protocol):
    """What a model is to read.

    Attributes:
        seq_len: S.
        identity: what tells it from other texts, for JSON.
    """

    seq_len: int
    identity: dict[str, Any]

    def batches(self, rows: int) -> Iterator[Batch]:
        """The text in order, at most `rows` sequences at a time."""
        ...


class PreparedText:
    """Prepared data, one domain after the other.

    Args:
        windows: the data.
        max_tokens: approximate total, divided among the domains by size; each contributes a prefix of whole documents.
            None means everything.
        fingerprint: of the dataset.
    """

    def __init__(self, windows: ValidationWindows, max_tokens: int | None, fingerprint: str = "") -> None:
        self.windows, self.max_tokens, self.seq_len = windows, max_tokens, windows.seq_len
        split = windows.split
        self.identity = {"data": str(split.path), "split": split.name, "fingerprint": fingerprint}
        self.identity |= {"seq_len": self.seq_len, "max_tokens": max_tokens}

    def batches(self, rows: int) -> Iterator[Batch]:
        for domain, limit in self.windows.shares(self.max_tokens).items():
            for batch in self.windows.batches(domain, rows, limit):
                yield Batch(domain, *batch)


class RawText:
    """Documents that are tokenised as they are read; those of a domain are joined, with an EOS token after each.

    Args:
        documents: returns them anew, in their order; a domain's windows come as soon as they are full.
        tokenizer: the model's.
        seq_len: S.
        max_tokens: of the first documents; None for all.
        name: where the documents come from.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[Document]],
        tokenizer: "PreTrainedTokenizerBase",
        seq_len: int,
        max_tokens: int | None,
        name: str,
    ) -> None:
        self.documents, self.encode, self.eos = documents, Encoder(tokenizer), tokenizer.eos_token_id
        self.seq_len, self.max_tokens = seq_len, max_tokens
        self.identity = {"source": name, "seq_len": seq_len, "max_tokens": max_tokens}

    def batches(self, rows: int) -> Iterator[Batch]:
        size, left = rows * self.seq_len, self.max_tokens
        pending: dict[str, np.ndarray] = {}
        for document in self.documents():
            ids_T = np.array([*self.encode([document.text])[0], self.eos], np.int64)
            if left is not None:
                ids_T, left = ids_T[: left + 1], left - len(ids_T)
            tokens_T = np.concatenate([pending.get(document.domain, ids_T[:0]), ids_T])
            while len(tokens_T) > size:
                yield Batch(document.domain, *windows_of(tokens_T[: size + 1], self.seq_len))
                tokens_T = tokens_T[size:]
            pending[document.domain] = tokens_T
            if left is not None and left <= 0:
                break
        for domain, tokens_T in pending.items():
            if len(tokens_T) > 1:
                yield Batch(domain, *windows_of(tokens_T, self.seq_len))


class Prompt:
    """One text, of which every token is an input.

    Args:
        text: the prompt.
        tokenizer: the model's.
        seq_len: S; the sequence is shorter if the prompt is.
        special: whether to add the tokens that the tokenizer puts around a text.

    Raises:
        ConfigError: for a prompt without tokens.
    """

    def __init__(self, text: str, tokenizer: "PreTrainedTokenizerBase", seq_len: int, special: bool) -> None:
        self.ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if not self.ids:
            raise ConfigError("the prompt has no tokens")
        self.seq_len = min(seq_len, len(self.ids))
        self.identity = {"prompt": text, "seq_len": self.seq_len}

    def batches(self, rows: int) -> Iterator[Batch]:
        input_NS, target_NS, mask_NS = windows_of(np.array([*self.ids, IGNORED_TARGET], np.int64), self.seq_len)
        for start in range(0, len(input_NS), rows):
            part = slice(start, start + rows)
            yield Batch(PROMPT, input_NS[part], target_NS[part], mask_NS[part])


class TokenIds:
    """Token ids, every one of which is an input.

    Args:
        token_NS: (N, S) int64.
        domain: what the text is.

    Raises:
        ConfigError: for anything else.
    """

    def __init__(self, token_NS: Tensor, domain: str = GIVEN) -> None:
        if token_NS.ndim != 2 or token_NS.dtype != torch.int64 or token_NS.numel() == 0:
            raise ConfigError(f"token ids must be int64 (N, S), but are {token_NS.dtype} {tuple(token_NS.shape)}")
        self.token_NS, self.seq_len, self.domain = token_NS.cpu(), token_NS.shape[1], domain
        self.identity = {"tokens": token_NS.numel(), "seq_len": self.seq_len}

    def batches(self, rows: int) -> Iterator[Batch]:
        for part_NS in self.token_NS.split(rows):
            target_NS = torch.full_like(part_NS, IGNORED_TARGET)
            target_NS[:, :-1] = part_NS[:, 1:]
            yield Batch(self.domain, part_NS, target_NS, torch.ones_like(part_NS, dtype=torch.bool))


class TokenTexts:
    """What each token adds to the text; a character that takes several tokens is with the last of them.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.decode = functools.lru_cache(CACHED)(lambda ids: tokenizer.decode(list(ids)))

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The texts of a sequence's tokens."""
        texts: list[str] = []
        # Each token is decoded after the piece before it, because some decoders drop a space at the start of a text.
        before, start = 0, 0
        for end in range(1, len(ids) + 1):
            known = self.decode(tuple(ids[before:start]))
            text = self.decode(tuple(ids[before:end]))[len(known) :]
            if text.endswith(REPLACEMENT) and end < len(ids) and end - start < CHARACTER_TOKENS:
                texts.append("")
                continue
            texts.append(text)
            before, start = start, end
        return texts
