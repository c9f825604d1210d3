"""`prepare`: from sources to a dataset folder of shards, resumable after a kill at any moment.

The steps: scan all documents (which finds errors, sizes, domains and the split), train or load the tokenizer,
write the shards of each split, and finally write `dataset.json`. The journal records each finished step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from remoe.errors import DataError
from remoe.lab.console import MEGABYTE, SECONDS_BETWEEN_LINES, Reporter
from remoe.lab.data.chat import ChatEncoder
from remoe.lab.data.dataset import open_dataset
from remoe.lab.data.journal import (
    TOKENIZER_FOLDER,
    ChangedError,
    Journal,
    check_replaceable,
    check_same,
    check_shards,
    clean,
    describe_request,
    find_journal,
)
from remoe.lab.data.manifest import MANIFEST_NAME, SPLITS, Manifest, SplitName, summarise
from remoe.lab.data.options import PrepareOptions
from remoe.lab.data.scan import Inputs, Scan, check_apart, scan
from remoe.lab.data.sources import FileSource, check_name
from remoe.lab.data.tokenizer import (
    Encoder,
    load_tokenizer,
    sample_evenly,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from remoe.lab.data.writer import ShardWriter, encode_documents
from remoe.lab.files import Signature, atomic_write, disk_errors, locked, replacing
from remoe.lab.text import short_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_KINDS = 5
UINT16_VOCABULARY = 1 << 16


def prepare(options: PrepareOptions, *, wait: bool = False) -> Path:
    """Make the dataset that `options` describes, and return its folder.

    Resumes an earlier call with the same options that was interrupted, with a byte-identical result, and returns
    at once if that call had finished. While another process prepares the same folder, waits for it if `wait`,
    otherwise raises DataError. Raises DataError and ConfigError for problems that the user can fix.
    """
    folder = Path(options.out)
    for name in (*options.sources, *options.validation, str(folder.absolute()), options.tokenizer or ""):
        check_name(name)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, not a folder")
    check_apart(options)
    inputs = Inputs.resolve(options)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, None if wait else DataError(f"{folder}: another process is preparing this folder")):
        _Preparation(options, folder, inputs).run()
    return folder


class _Preparation:
    def __init__(self, options: PrepareOptions, folder: Path, inputs: Inputs) -> None:
        self.options = options
        self.folder = folder
        self.inputs = inputs
        self.reporter = Reporter(options.quiet)
        self.begin = time.monotonic()

    def run(self) -> None:
        signatures = self.inputs.signatures()
        journal = self._earlier(signatures)
        if journal is not None and journal.finished:
            open_dataset(self.folder)
            self.reporter.line(f"{self.folder}: already prepared with these arguments")
            return
        if journal is None:
            if self.options.tokenizer is not None:  # checked first, so that a wrong name leaves nothing behind
                tokenizer = load_tokenizer(self.options.tokenizer)
                if self.options.chat:
                    ChatEncoder(tokenizer)
            journal = Journal(
                request=describe_request(self.options),
                inputs=signatures,
                scan=self._scan(),
                shards={split: [] for split in SPLITS},
            )
        self._record(journal)
        clean(self.folder, journal)
        check_shards(self.folder, journal)
        tokenizer = self._tokenizer()
        self._tokenise(tokenizer)
        if self.inputs.signatures() != signatures:
            raise ChangedError(f"{self.folder}: a source changed while it was read; use --overwrite to start over")
        self._finish(tokenizer)

    def _earlier(self, signatures: dict[str, Signature]) -> Journal | None:
        """The journal to resume from, or None to start from the beginning."""
        if self.options.overwrite:
            check_replaceable(self.folder)
            return None
        journal = find_journal(self.folder)
        if journal is not None:
            check_same(self.folder, journal, describe_request(self.options), signatures)
        return journal

    def _scan(self) -> Scan:
        begin = time.monotonic()
        found = scan(self.inputs, self.options, self.reporter)
        self.reporter.line(
            f"read {found.documents} documents, {found.bytes / MEGABYTE:.1f} MB in {_since(begin)};"
            f" domains: {', '.join(map(short_name, found.domains))}"
        )
        sources = [*self.inputs.train, *self.inputs.validation]
        left_out = [path for source in sources if isinstance(source, FileSource) for path in source.left_out]
        if left_out:
            kinds = sorted({path.suffix or path.name for path in left_out})
            more = " and others" if len(kinds) > SHOWN_KINDS else ""
            self.reporter.line(f"skipped {len(left_out)} files of other kinds: {', '.join(kinds[:SHOWN_KINDS])}{more}")
        return found

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer saved in the folder, which is made first if it is missing."""
        path = self.folder / TOKENIZER_FOLDER
        recorded = self.journal.tokenizer_fingerprint
        if recorded is None:
            begin = time.monotonic()
            given = self.options.tokenizer
            made = self._train_tokenizer() if given is None else load_tokenizer(given)
            with replacing(path) as temporary:
                made.save_pretrained(temporary)
            deed = "trained a tokenizer" if given is None else f"loaded the tokenizer {given}"
            self.reporter.line(f"{deed} of {vocabulary_size(made)} tokens in {_since(begin)}")
        tokenizer = load_tokenizer(path)  # the saved one, as any later run will load it
        fingerprint = tokenizer_fingerprint(tokenizer)
        if recorded not in (None, fingerprint):
            raise DataError(f"{path}: has changed since the preparation began; use --overwrite to start over")
        self._record(self.journal.model_copy(update={"tokenizer_fingerprint": fingerprint}))
        return tokenizer

    def _train_tokenizer(self) -> "PreTrainedTokenizerBase":
        limit = int(self.options.tokenizer_sample_mb * MEGABYTE)
        total = self.journal.scan.train_bytes
        stream = self.inputs.documents("train", self.journal.scan.holdout)
        with self.reporter.task("training the tokenizer", min(limit, total)) as advance:

            def texts() -> Iterator[str]:
                for text in sample_evenly((document.text for document in stream), total, limit):
                    advance(len(text))
                    yield text

            return train_tokenizer(texts(), self.options.vocab_size, self._while_training())

    def _while_training(self) -> Callable[[float], None]:
        """Writes a line now and then, for outputs that have no bar whose clock runs."""
        last = 0.0

        def waiting(seconds: float) -> None:
            nonlocal last
            if seconds - last >= SECONDS_BETWEEN_LINES and not self.reporter.console.is_terminal:
                last = seconds
                self.reporter.line(f"training the tokenizer: {seconds:.0f} s")

        return waiting

    def _tokenise(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        done = sum(shard.bytes for shards in self.journal.shards.values() for shard in shards)
        if done:
            self.reporter.line(f"resuming after {done / MEGABYTE:.1f} MB in finished shards")
        begin = time.monotonic()
        with self.reporter.task("tokenising", self.journal.scan.bytes, done) as advance:
            for split in SPLITS:
                if split not in self.journal.finished_splits:
                    self._write_split(split, tokenizer, advance)
        amount = (self.journal.scan.bytes - done) / MEGABYTE
        self.reporter.line(f"tokenised {amount:.1f} MB in {_since(begin)}")

    def _write_split(
        self, split: SplitName, tokenizer: "PreTrainedTokenizerBase", advance: Callable[[int], None]
    ) -> None:
        scanned, done = self.journal.scan, self.journal.shards[split]
        writer = ShardWriter(
            self.folder,
            split,
            domains=scanned.domains,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            shard_tokens=self.options.shard_tokens,
            first_index=len(done),
            finished=lambda record: self._record(self.journal.with_shard(split, record)),
        )
        documents = self.inputs.documents(split, scanned.holdout)
        remaining = islice(documents, sum(shard.documents for shard in done), None)
        dtype = np.dtype(_token_dtype(tokenizer))
        if self.options.chat:
            encode = ChatEncoder(tokenizer)
            for document in remaining:
                tokens_S, targets_S, size = encode(document.text)
                writer.add(tokens_S.astype(dtype), document.domain, size, targets_S)
                advance(document.num_bytes)
        else:
            encoded = encode_documents(remaining, Encoder(tokenizer), tokenizer.eos_token_id, dtype)
            with closing(encoded):
                for document, tokens_S in encoded:
                    size = document.num_bytes
                    writer.add(tokens_S, document.domain, size)
                    advance(size)
        writer.flush()
        self._record(self.journal.with_split(split))

    def _finish(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        options, holdout = self.options, self.journal.scan.holdout
        manifest = Manifest(
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=vocabulary_size(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            token_dtype=_token_dtype(tokenizer),
            domains=self.journal.scan.domains,
            sources=list(options.sources),
            validation=list(options.validation),
            validation_fraction=None if holdout is None else options.validation_fraction,
            seed=None if holdout is None else options.seed,
            splits={split: summarise(self.journal.shards[split]) for split in SPLITS},
        )
        splits = manifest.splits
        if sum(split.documents for split in splits.values()) != self.journal.scan.documents:
            raise ChangedError(
                f"{self.folder}: the sources changed while they were read; use --overwrite to start over"
            )
        manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
        atomic_write(self.folder / MANIFEST_NAME, manifest.to_bytes())
        self._record(self.journal.model_copy(update={"finished": True}))
        seconds = time.monotonic() - self.begin
        size = sum(split.bytes for split in splits.values()) / MEGABYTE
        shards = ", ".join(f"{len(split.shards)} {name} shards" for name, split in splits.items())
        self.reporter.line(
            f"{self.folder}: {sum(split.documents for split in splits.values())} documents,"
            f" {sum(split.tokens for split in splits.values())} tokens, {size:.1f} MB"
            f" ({size / seconds:.1f} MB/s overall), {shards}"
        )

    def _record(self, journal: Journal) -> None:
        journal.write(self.folder)
        self.journal = journal


def _token_dtype(tokenizer: "PreTrainedTokenizerBase") -> Literal["uint16", "uint32"]:
    return "uint16" if vocabulary_size(tokenizer) <= UINT16_VOCABULARY else "uint32"


def _since(begin: float) -> str:
    return f"{time.monotonic() - begin:.1f} s"
