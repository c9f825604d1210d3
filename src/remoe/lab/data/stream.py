"""Datasets whose training text is read with `datasets` while a model trains, and is never held or stored as a whole.

`open_stream` stores the tokenizer, the held-out text as a shard of validation, and where the text is. The batches are
those of `stream_batches.py`.
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remoe.errors import ConfigError, DataError
from remoe.lab.console import say
from remoe.lab.data.dataset import Dataset, open_dataset
from remoe.lab.data.documents import Document, known_suffix, make_document
from remoe.lab.data.manifest import MANIFEST_NAME, Manifest, ShardRecord, StreamRecord, summarise
from remoe.lab.data.scan import Holdout
from remoe.lab.data.sources import ABOUT, check_file, check_package, first_line, is_saved_dataset, split_name
from remoe.lab.data.tokenizer import Encoder, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from remoe.lab.data.writer import ShardWriter, encode_documents
from remoe.lab.files import locked, new_folder, walk_files

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

State = dict[str, Any] | None  # of an IterableDataset, as JSON; None is its beginning
LINES = "text"
KINDS = {  # the builder of `datasets` for a file's suffix
    ".jsonl": LINES,  # the builder "json" refuses a file in which later rows have other keys or types than the first
    ".jsonl.gz": LINES,
    ".jsonl.zst": LINES,
    ".parquet": "parquet",
    ".csv": "csv",
}
# Every document is held out, or not, by the hash of its text, so copies of a held-out document are not trained on.
HOLDOUT = Holdout(seed=0, fraction=0.02, always=frozenset(), never=frozenset())
HELD_OUT_TOKENS = 2**19  # of them are enough to measure a loss to 0.01
ROWS = 256  # of a Parquet file that are held in memory at a time
HELD_OUT_FILES = 16  # from which they are taken, in turn


@dataclass(frozen=True)
class TextStream:
    """Text in the files of a source, which can be read from any document on.

    Attributes:
        record: of the source.
        dataset: of `datasets`; its shards are the files.
        lines: whether its rows are lines of JSON.
    """

    record: StreamRecord
    dataset: "IterableDataset"
    lines: bool = False

    def documents(self, part: int, parts: int, state: State = None) -> Iterator[tuple[State, Document | None]]:
        """The documents of every file whose number is `part` modulo `parts`, and the state from which each is read.

        A blank text is None. Raises DataError for what cannot be read, and for a text that is no string.
        """
        name, column = self.record.source, self.record.column
        try:
            dataset = self.dataset.shard(num_shards=parts, index=part, contiguous=False)
            if state is not None:
                dataset.load_state_dict(state)
            rows = iter(dataset)
        except Exception as error:  # `datasets`, Arrow and the hub's client share no base class of errors
            raise DataError(f"{name}: cannot be read: {first_line(error)}") from error
        while True:
            try:
                row = next(rows, None)
                after = None if row is None else dataset.state_dict()
            except Exception as error:
                raise DataError(f"{name}: cannot be read: {first_line(error)}") from error
            if row is None:
                return
            if self.lines:
                row = _object(row[LINES], name) if row[LINES].strip() else {column: ""}
            if column not in row:
                raise DataError(f"{name}: no column {column!r} (columns present: {', '.join(row)}); see --text-column")
            yield state, make_document(row[column], "text", None, name)
            state = after


def _object(line: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{name}: cannot be read: {first_line(error)}: {line[:60]!r}") from error
    if not isinstance(found, dict):
        raise DataError(f"{name}: cannot be read: a line is no JSON object: {line[:60]!r}")
    return found


def open_stream(data: str, column: str, parent: Path, tokenizer: str | Path | None) -> Dataset:
    """The dataset of a streamed source; its held-out text is read once, into a folder of `parent`/data.

    Args:
        data: a file or a folder of .jsonl, .parquet or .csv, or `hf:NAME[:CONFIG[:SPLIT]]`.
        column: of the text.
        parent: folder.
        tokenizer: a folder, or a name on the hub.

    Raises:
        ConfigError: without a tokenizer.
        DataError: for a source that cannot be read as a stream, or holds too little text.
    """
    if tokenizer is None:
        raise ConfigError(
            f"--stream {data}: name with --tokenizer the tokenizer of its text: a folder, or one on the hub"
        )
    loaded = load_tokenizer(tokenizer)
    stream = _find(data, column)
    key = [stream.record.identity, column, tokenizer_fingerprint(loaded)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
    name = Path(stream.record.source.removeprefix("hf:").split(":")[0]).name
    out = parent / "data" / f"{name}-stream-{digest}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent, None):  # where several commands start together, one writes it and the others wait
        if not (out / MANIFEST_NAME).exists():
            say(f"reading the held-out text of {data} into {out}")
            with new_folder(out) as folder:
                _write(stream, name, loaded, folder)
    return open_dataset(out)


def reopen(record: StreamRecord) -> TextStream:
    """The source of a dataset; raises DataError when it is gone, cannot be read or has changed."""
    found = _find(record.source, record.column)
    if found.record != record:
        raise DataError(f"{record.source}: has changed since it was first read as a stream: its files differ")
    return found


def _find(data: str, column: str) -> TextStream:
    check_package(data)
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # an error is one line, and ours
    datasets.disable_progress_bars()
    kind, options = None, {}
    if data.startswith("hf:"):
        target, config, split = split_name(data)
        if Path(target).exists():
            raise DataError(f"{data}: name a file or folder without `hf:`")
        source, arguments, split = data, (target, config or None), split or "train"
        files: list[Path] = []
    else:
        place, files = Path(data).resolve(), _files(data)
        kind = KINDS[known_suffix(files[0])]
        source, split = str(place), "train"
        arguments = (kind, None, None, {split: [glob.escape(str(path)) for path in files]})
        if kind == "parquet":  # else it reads all columns, a row group at a time
            options = {"columns": [column], "batch_size": ROWS}
        elif kind == "csv":  # else it takes texts such as "NA" for missing ones, and digits for numbers
            text = datasets.Features({column: datasets.Value("string")})
            options = {"usecols": [column], "features": text, "keep_default_na": False}
    try:
        builder = datasets.load_dataset_builder(*arguments, **options)
        dataset = builder.as_streaming_dataset(split=split)
        if files:
            base = place if place.is_dir() else place.parent
            identity = [[str(path.relative_to(base)), *_size_and_time(path)] for path in files]
        else:  # their addresses name the revision
            identity = [[builder.hash, split], *([str(file)] for file in (builder.config.data_files or {})[split])]
        count = dataset.num_shards
    except DataError:
        raise
    except Exception as error:  # the hub, its client and the dataset's own files share no base class of errors
        raise DataError(f"{data}: cannot be read as a stream: {first_line(error)}") from error
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return TextStream(StreamRecord(source=source, column=column, identity=digest, files=count), dataset, kind == LINES)


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _files(data: str) -> list[Path]:
    """The files of a local source, in order; raises DataError unless they are of one kind that can be streamed."""
    place, known = Path(data).resolve(), ", ".join(KINDS)
    if not place.exists():
        raise DataError(f"{data}: no such file or folder")
    if is_saved_dataset(place):
        raise DataError(f"{data}: written by save_to_disk, from which nothing is streamed; leave out --stream")
    found = walk_files(place) if place.is_dir() else [place]
    files = [path for path in found if known_suffix(path) in KINDS and path.name.lower() != ABOUT]
    if not files:
        raise DataError(f"{data}: no file that can be streamed (known: {known}); leave out --stream for other text")
    if len({KINDS[known_suffix(path)] for path in files}) > 1:
        raise DataError(f"{data}: files of several kinds; name a folder of one of them: {known}")
    for path in files:
        check_file(path)
    return files


def _write(stream: TextStream, name: str, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    size, digest = vocabulary_size(tokenizer), tokenizer_fingerprint(tokenizer)
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    records: list[ShardRecord] = []
    writer = ShardWriter(
        folder,
        "validation",
        domains=[name],
        tokenizer_fingerprint=digest,
        shard_tokens=2 * HELD_OUT_TOKENS,
        first_index=0,
        finished=records.append,
    )
    encoded = encode_documents(_held_out(stream), Encoder(tokenizer), tokenizer.eos_token_id, dtype)
    tokens = 0
    with closing(encoded):
        for document, tokens_S in encoded:
            writer.add(tokens_S, name, document.num_bytes)
            tokens += len(tokens_S)
            if tokens >= HELD_OUT_TOKENS:
                break
    writer.flush()
    if not records:
        raise DataError(
            f"{stream.record.source}: too few documents to hold any out ({HOLDOUT.fraction:.0%} of them);"
            " leave out --stream, which prepares the whole text first"
        )
    manifest = Manifest(
        tokenizer_fingerprint=digest,
        vocab_size=size,
        eos_token_id=tokenizer.eos_token_id,
        token_dtype=dtype.name,
        domains=[name],
        sources=[stream.record.source],
        validation=[],
        validation_fraction=HOLDOUT.fraction,
        seed=HOLDOUT.seed,
        splits={"train": summarise([]), "validation": summarise(records)},
        stream=stream.record,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _held_out(stream: TextStream) -> Iterator[Document]:
    """The documents that are held out, from some files in turn."""
    files = stream.record.files
    numbers = sorted({file * files // HELD_OUT_FILES for file in range(HELD_OUT_FILES)})
    waiting = [stream.documents(number, files) for number in numbers]
    while waiting:
        for documents in list(waiting):
            read = next(documents, None)
            if read is None:
                waiting.remove(documents)
            elif read[1] is not None and HOLDOUT.holds_out(read[1]):
                yield read[1]
