"""Readers of text files, JSON lines and Parquet: one file in, a stream of documents out."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from remoe.errors import DataError
from remoe.lab.data.documents import Columns, Document, make_document

ROWS_PER_BATCH = 256  # documents are often tens of kilobytes, so this holds a few MB in memory at a time


def read_text(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a `.txt` file as one document of domain `domain`.

    Raises DataError for a file that cannot be read or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start} cannot be decoded)") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    document = make_document(text, domain, None, str(path))
    if document is not None:
        yield document


def read_jsonl(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a file of JSON objects, one a line, plain or compressed by gzip or zstd, line by line.

    A line without the key `domain` belongs to `domain`. Raises DataError naming file and line.
    """
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        # pyarrow's streams, unlike zstandard's, report a compressed file that was cut short
        with pa.input_stream(str(path), compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
                if not line.isspace():
                    document = _json_document(line, columns, domain, f"{path}: line {number}")
                    if document is not None:
                        yield document
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}") from None


def _json_document(line: bytes, columns: Columns, domain: str, place: str) -> Document | None:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise DataError(f"{place}: not JSON that can be read ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object")
    check_columns(columns, list(row), place)
    group = None if columns.group is None else row[columns.group]
    return make_document(row[columns.text], row.get(columns.domain, domain), group, place)


def read_parquet(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a Parquet file batch by batch; rows belong to `domain` if it has no domain column.

    Raises DataError naming the file, and the row (counted from 0) where one is at fault.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = wanted_columns(columns, file.schema_arrow, str(path))
            batches = file.iter_batches(ROWS_PER_BATCH, columns=names)
            yield from arrow_documents(batches, columns, domain, str(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}") from None


def check_columns(columns: Columns, present: list[str], place: str) -> None:
    """Raise DataError if a column that must be there is not, naming those that are."""
    required = [columns.text]
    required += [columns.domain] if columns.domain_required else []
    required += [] if columns.group is None else [columns.group]
    for name in required:
        if name not in present:
            raise DataError(f"{place}: no column {name!r} (columns present: {', '.join(present) or 'none'})")


def wanted_columns(columns: Columns, schema: pa.Schema, place: str) -> list[str]:
    """Names of the columns to read from a table of this schema; raises DataError as `check_columns`."""
    check_columns(columns, schema.names, place)
    for name in (columns.text, columns.domain):
        if name in schema.names and not _is_text(schema.field(name).type):
            raise DataError(f"{place}: column {name!r} holds {schema.field(name).type}, not text")
    wanted = dict.fromkeys((columns.text, columns.domain, columns.group))  # one column may be two of them
    return [name for name in wanted if name in schema.names]


def arrow_documents(
    batches: Iterator[pa.RecordBatch] | Iterator[pa.Table], columns: Columns, domain: str, place: str
) -> Iterator[Document]:
    """Turn Arrow tables into documents; `place` names the source in errors."""
    row = 0
    for batch in batches:
        count = batch.num_rows
        try:
            texts = batch.column(columns.text).to_pylist()
        except UnicodeDecodeError:
            raise DataError(f"{place}: not UTF-8 text in rows {row} to {row + count - 1}") from None
        has_domain = columns.domain in batch.schema.names
        domains = batch.column(columns.domain).to_pylist() if has_domain else [domain] * count
        groups = [None] * count if columns.group is None else batch.column(columns.group).to_pylist()
        for offset in range(count):
            at = f"{place}: row {row + offset}"
            document = make_document(texts[offset], domains[offset], groups[offset], at)
            if document is not None:
                yield document
        row += count


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # a column of nothing but nulls has no type: its first row gives the better message
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in strings)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


Reader = Callable[[Path, Columns, str], Iterator[Document]]

# the longest suffix first, so that `.jsonl.gz` is cut off whole
READERS: dict[str, Reader] = {
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def known_suffix(path: Path) -> str | None:
    """The suffix by which `path` has a reader, or None."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)
