"""What `prepare` is asked to do: plain data, importable without torch or transformers."""

import math
from dataclasses import dataclass
from pathlib import Path

from remoe.errors import ConfigError

BYTE_ALPHABET = 256  # a byte-level vocabulary holds every byte, so that any text can be written in it


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare, from what, and where; `remoe data prepare` shows the texts below as its help."""

    sources: tuple[str, ...] = ("stdlib",)
    """Where the text comes from: files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders of them,
    `hf:NAME[:CONFIG[:SPLIT]]` for a Hugging Face dataset, a folder that `datasets` wrote with save_to_disk,
    or `stdlib`: the running Python's own standard library, which needs no network."""
    out: Path
    """Folder to write: shards, tokenizer and dataset.json. A new or empty one, or one that this same
    command began: then the work goes on where it stopped."""
    validation: tuple[str, ...] = ()
    """Sources held out for validation, given like the others. Without any, whole documents (whole files,
    for stdlib) are held out of the training sources."""
    validation_fraction: float = 0.02
    """Share of the source items to hold out, when no validation sources are given; each domain with two
    or more items gives at least one."""
    tokenizer: str | None = None
    """A tokenizer that transformers can load: a folder, or a name on the hub. Without it, a byte-level
    BPE is trained on the training text."""
    vocab_size: int = 4096
    """Entries of the BPE to train, the 256 bytes and <|endoftext|> included. Not used with --tokenizer."""
    tokenizer_sample_mb: float = 64.0
    """At most so many MB of training text, spread evenly over it, teach the BPE."""
    text_column: str = "text"
    """Column of a table, or key of a JSON line, that holds the text."""
    domain_column: str = "domain"
    """Column that holds the domain (code, books, ...). Where the data has no column `domain`, the domain
    is the file's or folder's name."""
    group_column: str | None = None
    """Column that names the source item a row was cut from (a book, a site): rows that share it are never
    divided between training and validation. Without it, every distinct text is an item of its own."""
    shard_tokens: int = 50_000_000
    """Tokens in a shard, at most; a single document that is longer has a shard to itself."""
    seed: int = 0
    """Decides which items are held out."""
    overwrite: bool = False
    """Throw away what an earlier preparation left in the folder, finished or not, and start from the
    beginning; leave it out to go on with an unfinished one. Files of others in the folder stay."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no sources: name at least one file, folder, hf:NAME or stdlib")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(f"--validation-fraction must lie between 0 and 1, not {self.validation_fraction}")
        if self.tokenizer is None and self.vocab_size <= BYTE_ALPHABET:
            raise ConfigError(f"--vocab-size must be at least {BYTE_ALPHABET + 1}, not {self.vocab_size}")
        if not 0 < self.tokenizer_sample_mb < math.inf:
            raise ConfigError(f"--tokenizer-sample-mb must be positive, not {self.tokenizer_sample_mb}")
        if self.shard_tokens < 1:
            raise ConfigError(f"--shard-tokens must be positive, not {self.shard_tokens}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"--seed must be a number of 64 bits, not {self.seed}")
