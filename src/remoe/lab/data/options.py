"""Options of `prepare`: plain data, importable without torch or transformers."""

import math
from dataclasses import dataclass
from pathlib import Path

from remoe.errors import ConfigError

BYTE_ALPHABET = 256  # a byte-level vocabulary contains every byte, so that it can encode any text

LARGEST_VOCABULARY = 1 << 20  # four times the largest in use; the training allocates memory for it first


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of a preparation; `remoe data prepare` shows the descriptions below as its help."""

    sources: tuple[str, ...] = ("stdlib",)
    """Where the text comes from: files (.txt and .jsonl, also .gz and .zst, .md, .csv, .parquet), folders of them,
    `hf:NAME[:CONFIG[:SPLIT]]` for a Hugging Face dataset, a folder that `datasets` wrote with save_to_disk,
    or `stdlib`, the standard library of the running Python, which needs no network."""
    out: Path
    """Folder for the shards, the tokenizer and dataset.json. It must be new or empty, or contain an unfinished
    preparation with the same arguments, which is then resumed."""
    validation: tuple[str, ...] = ()
    """Sources for validation, named like the training sources. Without any, whole documents (for stdlib, whole
    files) of the training sources are held out."""
    validation_fraction: float = 0.02
    """Share of the source items to hold out if there are no validation sources; each domain with two or more
    items holds out at least one."""
    tokenizer: str | None = None
    """A tokenizer that transformers can load: a folder or a name on the hub. By default a byte-level BPE is
    trained on the training text."""
    vocab_size: int = 4096
    """Vocabulary size of the BPE to train, including the 256 bytes and <|endoftext|>. Ignored with --tokenizer."""
    tokenizer_sample_mb: float = 64.0
    """Maximum amount of training text, in MB, to train the BPE on, sampled evenly."""
    text_column: str = "text"
    """Column of a table, or key of a JSON line, that contains the text."""
    chat: bool = False
    """The key `messages` of each JSON line is a conversation: a list of messages with `role` and `content`. It is
    written by the chat template of --tokenizer, and the loss is on the messages of the role `assistant` alone. Another
    key can be named with --text-column."""
    domain_column: str = "domain"
    """Column that contains the domain (code, books, ...). If the data has no column `domain`, the domain is the
    name of the file or folder."""
    group_column: str | None = None
    """Column that names the source item of a row (a book, a site). Rows of one item are never divided between
    training and validation. By default every distinct text is an item of its own."""
    shard_tokens: int = 50_000_000
    """Maximum number of tokens in a shard; a longer document gets a shard to itself."""
    seed: int = 0
    """Seed that determines which items are held out."""
    overwrite: bool = False
    """Discard an earlier preparation in the folder, finished or not, and start from the beginning. Other files in
    the folder are kept. Without this option an unfinished preparation is resumed."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no sources: name at least one file, folder, hf:NAME or stdlib")
        if self.chat and self.tokenizer is None:
            raise ConfigError("--chat needs --tokenizer, a tokenizer with a chat template")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(f"--validation-fraction must lie between 0 and 1, not {self.validation_fraction}")
        if self.tokenizer is None and self.vocab_size <= BYTE_ALPHABET:
            raise ConfigError(f"--vocab-size must be at least {BYTE_ALPHABET + 1}, not {self.vocab_size}")
        if self.tokenizer is None and self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(f"--vocab-size must be at most {LARGEST_VOCABULARY}, not {self.vocab_size}")
        if not 0 < self.tokenizer_sample_mb < math.inf:
            raise ConfigError(f"--tokenizer-sample-mb must be positive, not {self.tokenizer_sample_mb}")
        if self.shard_tokens < 1:
            raise ConfigError(f"--shard-tokens must be positive, not {self.shard_tokens}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"--seed must be a 64-bit integer, not {self.seed}")
