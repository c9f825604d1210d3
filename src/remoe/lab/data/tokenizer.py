"""Tokenizers: training a byte-level BPE, loading any that transformers supports, and fingerprints."""

import hashlib
import json
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model")  # of every kind that transformers reads
SAMPLE_CHARACTERS = 65_536  # documents are sampled in pieces of this size, so that a huge one is sampled too


# Longer runs of letters, digits, signs or white space, as in DNA or Chinese text, are cut where a tokenizer is trained:
# every new token costs time in proportion to the length of the runs that have it.
LONGEST_RUN = 256
_LONG_RUN = re.compile(
    rf"(?<!\w)\w{{{LONGEST_RUN + 1},}}|(?<!\s)\s{{{LONGEST_RUN + 1},}}|(?<![^\w\s])[^\w\s]{{{LONGEST_RUN + 1},}}"
)
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_RUN + 1}}}")
_POLL_SECONDS = 0.1
ENCODED_AT_ONCE, BATCH = 8_000_000, 16  # characters of a text, and the pieces in which they are encoded
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, waiting: Callable[[float], object] = lambda seconds: None
) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE with all 256 bytes and `<|endoftext|>`, the token that ends, begins and pads documents.

    The vocabulary is smaller than `vocab_size` if the text has too few distinct words. While merges are computed,
    `waiting` is called with the seconds since the start, ten times a second.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in cut_runs(text))
    _run_in_thread(lambda: backend.train_from_iterator(pieces, trainer), waiting)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def cut_runs(text: str) -> Iterator[str]:
    """The text in pieces, cut only within runs of more than LONGEST_RUN characters of one kind."""
    start = 0
    if max(map(len, text.split()), default=0) > LONGEST_RUN or _LONG_SPACE.search(text):  # much faster than _LONG_RUN
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield text[start:cut]
                start = cut
    yield text[start:]


def _run_in_thread(work: Callable[[], object], waiting: Callable[[float], object]) -> None:
    """Run `work`, which spends long in Rust, so that this thread hears Ctrl-C at once."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    begin, thread = time.monotonic(), threading.Thread(target=guarded, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        waiting(time.monotonic() - begin)
    if errors:
        raise errors[0]


def sample_evenly(texts: Iterator[str], total_bytes: int, limit_bytes: int) -> Iterator[str]:
    """Yield pieces of `texts`, at most `limit_bytes` in total, in order and spread evenly over `total_bytes`."""
    characters = max(1, min(SAMPLE_CHARACTERS, limit_bytes // 16))
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), characters):
            piece = text[start : start + characters]
            size = len(piece.encode("utf-8"))
            seen += size
            if total_bytes <= limit_bytes or (taken + size) * total_bytes <= seen * limit_bytes:
                taken += size
                yield piece


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or by its name on the hub, as transformers does.

    Raises DataError if it cannot be loaded, or if it has no end-of-text (EOS) token to end documents with.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise DataError(f"{name} holds no tokenizer: tokenizer.json is missing")
    if not path.exists() and (isinstance(name, Path) or path.is_absolute() or name.count("/") > 1):
        raise DataError(f"tokenizer {name} does not exist")  # a name on the hub has one slash at most
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # transformers, the hub's client and tokenizers share no base class of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"tokenizer {name}: cannot be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {name}: has no end-of-text (EOS) token, but every document must end with one")
    return tokenizer


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest token id, including added tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sha256 (hex) of a tokenizer's definition, the same after saving and loading and in every process."""
    if tokenizer.is_fast:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):  # left by the last call; not part of the tokenizer
            definition.pop(setting, None)
    else:
        definition = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


class Encoder:
    """Encodes texts as token ids, in batches; a tokenizer with a Rust core uses all CPU cores.

    Special tokens that are spelled out in a text are encoded as plain text, so that no document can contain an
    end of text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._backend = None
        if tokenizer.is_fast:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self._divides = _ends_words_at_spaces(json.loads(self._backend.to_str()))

    def __call__(self, texts: list[str]) -> list[Sequence[int]]:
        """Encode `texts`, adding no special tokens and truncating nothing."""
        if self._backend is not None:
            if self._divides and any(len(text) > ENCODED_AT_ONCE for text in texts):
                return [self._encode_in_pieces(text) for text in texts]
            return [item.ids for item in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False
        )["input_ids"]

    def _encode_in_pieces(self, text: str) -> array:
        """The same ids; the tokenizer needs about 100 bytes of memory per byte of text that it encodes at once."""
        assert self._backend is not None
        ids = array("I")
        for pieces in batched(words_apart(text, ENCODED_AT_ONCE // BATCH), BATCH):
            for item in self._backend.encode_batch_fast(pieces, add_special_tokens=False):
                ids.extend(item.ids)
        return ids


def words_apart(text: str, size: int) -> Iterator[str]:
    """The text in pieces of `size` characters or more, cut before a single space or line break between two words."""
    start = 0
    while (found := _BETWEEN_WORDS.search(text, start + size)) is not None:
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items; the last may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def _ends_words_at_spaces(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer is known to encode two words that a space divides as it encodes each of them."""
    added = all(token["special"] for token in definition["added_tokens"])  # others may span a space
    pre_tokenizer = definition["pre_tokenizer"] or {}
    byte_level = pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True)
    return bool(added and byte_level and not pre_tokenizer["add_prefix_space"] and definition["normalizer"] is None)
