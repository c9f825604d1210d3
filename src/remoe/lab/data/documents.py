"""Documents, and the readers that make them from text files, JSON lines, CSV, Parquet and Arrow tables."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from remoe.errors import DataError
from remoe.lab.text import short_name

if TYPE_CHECKING:  # the functions that read with it import pyarrow, so that documents alone come without it
    import pyarrow as pa
    import pyarrow.parquet as pq

TOTAL = "all"  # in tables and files, the row of all domains together
LONGEST = 1 << 28  # bytes of a document or a line, so that a small file that unpacks to a huge one does not fill memory
MOST_NAMES = 20  # of columns, in an error
ANSWERS = "assistant"  # the role in conversations whose messages are learned
ROWS_PER_BATCH = 256  # documents are often tens of kilobytes, so a batch takes a few MB of memory


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its domain; `group` names the source item that must stay on one side of the split.

    A document without a group is an item of its own, together with exact copies of its text.
    """

    text: str
    domain: str
    group: str | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return utf8_length(self.text)


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns to read; a `domain` column is optional under its default name only."""

    text: str = "text"
    domain: str = "domain"
    group: str | None = None
    chat: bool = False
    """Whether `text` names conversations, lists of messages, instead of texts; JSON lines alone can hold them."""

    @property
    def domain_required(self) -> bool:
        """Whether the user asked for this domain column by name."""
        return self.domain != "domain"


def utf8_length(text: str) -> int:
    """Length of `text` in UTF-8 bytes; raises UnicodeEncodeError for a lone surrogate, which UTF-8 cannot hold."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def is_blank(text: str) -> bool:
    """Whether `text` is empty or all white space, so that there is nothing to learn from it."""
    return not text or text.isspace()


def make_document(text: object, domain: object, group: object, place: str) -> Document | None:
    """Check one row and make it a document, or None if its text is blank.

    `place` names the row in errors. Raises DataError for a value that is not text or not valid Unicode.
    """
    if not isinstance(text, str):
        raise DataError(f"{place}: the text is {_describe(text)}, not a string")
    if not isinstance(domain, str) or not domain:
        raise DataError(f"{place}: the domain is {_describe(domain)}, not a name")
    if domain == TOTAL:
        raise DataError(f"{place}: {TOTAL!r} cannot be a domain's name, because it stands for all domains; rename it")
    if len(text) > LONGEST:
        raise DataError(f"{place}: longer than {LONGEST >> 20} MiB; divide it into several documents")
    if is_blank(text):
        return None
    group = None if group is None else str(group)
    for what, value in (("text", text), ("domain", domain), ("group", group or "")):
        try:
            utf8_length(value)
        except UnicodeEncodeError:
            raise DataError(f"{place}: the {what} contains a lone surrogate, which is not valid Unicode") from None
    return Document(text, domain, group)


def check_messages(messages: object, place: str) -> None:
    """Raise DataError, with `place`, for anything but a list of messages, each with `role` and `content`."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: the conversation is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{place}: a message must have `role` and `content`, both text")


def conversation(messages: object, place: str) -> str:
    """A conversation, a list of messages with `role` and `content`, as the text of a document: JSON.

    Raises:
        DataError: with `place`, for anything but a list of messages with an answer.
    """
    check_messages(messages, place)
    if not any(message["role"] == ANSWERS and message["content"] for message in messages):
        raise DataError(f"{place}: no message of the role {ANSWERS!r}, so there is nothing to learn")
    return json.dumps(messages, ensure_ascii=False)


def _describe(value: object) -> str:
    if value is None:
        return "missing (null)"
    return "empty" if value == "" else f"of type {type(value).__name__}"


def read_text(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a text file, plain or compressed, as one document of the given domain.

    Raises DataError for a file that cannot be read, is too long or is not UTF-8.
    """
    with _stream(path) as stream:
        content = stream.read(LONGEST + 1)
        _check_length(content, str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start} cannot be decoded)") from None
    document = make_document(text, domain, None, str(path))
    if document is not None:
        yield document


def read_jsonl(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a file of one JSON object per line, plain or compressed with gzip or zstd.

    A line without the key `domain` gets the given domain. Raises DataError naming the file and the line.
    """
    with _stream(path) as stream:
        lines = iter(lambda: stream.readline(LONGEST + 1), b"")
        for number, line in enumerate(lines, start=1):
            place = f"{path}: line {number}"
            _check_length(line, place)
            if not line.isspace():
                document = _json_document(line, columns, domain, place)
                if document is not None:
                    yield document


def read_csv(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a table of comma-separated values whose first row names the columns.

    Without a domain column, rows get the given domain. Raises DataError naming the file and the line.
    """
    line = 1
    try:
        with _stream(path) as stream, _longest_field():
            rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
            header = next(rows, [])
            _check_once(columns, header, str(path))
            check_columns(columns, header, str(path))
            for fields in rows:
                place, line = f"{path}: line {line + 1}", rows.line_num
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(f"{place}: {len(fields)} fields, but the first row has {len(header)}")
                row = dict(zip(header, fields, strict=True))
                group = None if columns.group is None else row[columns.group]
                document = make_document(row[columns.text], row.get(columns.domain, domain), group, place)
                if document is not None:
                    yield document
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text after line {line}") from None
    except csv.Error as error:
        raise DataError(f"{path}: line {line + 1}: cannot be read: {error}") from None


@contextmanager
def _longest_field() -> Iterator[None]:
    """Fields of up to LONGEST characters, where Python's limit, which holds for the process, is 131,072."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its suffix says so; errors of reading are DataErrors."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        if compression is not None and path.stat().st_size == 0:
            raise DataError(f"{path}: empty, which is not a compressed file")
        # unlike zstandard's streams, pyarrow's report a compressed file that was truncated
        with pa.input_stream(str(path), compression=compression) as stream:
            yield io.BufferedReader(stream, 1 << 20)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}") from None


def _check_length(content: bytes, place: str) -> None:
    if len(content) > LONGEST:
        raise DataError(f"{place}: longer than {LONGEST >> 20} MiB; divide it into several documents")


def _json_document(line: bytes, columns: Columns, domain: str, place: str) -> Document | None:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise DataError(f"{place}: JSON that cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object")
    check_columns(columns, list(row), place)
    group = None if columns.group is None else row[columns.group]
    text = conversation(row[columns.text], place) if columns.chat else row[columns.text]
    return make_document(text, row.get(columns.domain, domain), group, place)


def read_parquet(path: Path, columns: Columns, domain: str) -> Iterator[Document]:
    """Read a Parquet file batch by batch; without a domain column, rows get the given domain.

    Raises DataError naming the file and, for a faulty row, its number from 0.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = columns_to_read(columns, file.schema_arrow, str(path))
            batches = file.iter_batches(_rows_at_once(file.metadata), columns=names)
            yield from arrow_documents(batches, columns, domain, str(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}") from None


def _rows_at_once(metadata: "pq.FileMetaData") -> int:
    """ROWS_PER_BATCH, or fewer where they would be more than LONGEST bytes by the mean of a row group."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    mean = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=0)
    return max(1, min(ROWS_PER_BATCH, int(LONGEST / max(mean, 1))))


def _check_once(columns: Columns, present: Sequence[str], place: str) -> None:
    for name in {columns.text, columns.domain, columns.group}:
        if name is not None and list(present).count(name) > 1:
            raise DataError(f"{place}: several columns are named {name!r}")


def check_columns(columns: Columns, present: list[str], place: str) -> None:
    """Raise DataError if a required column is missing; the message lists those present."""
    names = ", ".join(map(short_name, present[:MOST_NAMES])) + (", ..." if len(present) > MOST_NAMES else "")
    required = [columns.text]
    required += [columns.domain] if columns.domain_required else []
    required += [] if columns.group is None else [columns.group]
    for name in required:
        if name not in present:
            raise DataError(f"{place}: no column {name!r} (columns present: {names or 'none'})")


def columns_to_read(columns: Columns, schema: "pa.Schema", place: str) -> list[str]:
    """Names of the columns to read from a table of this schema.

    Raises DataError as `check_columns` does, for two columns of one name, and for a text or domain column of another
    type.
    """
    _check_once(columns, schema.names, place)
    check_columns(columns, schema.names, place)
    for name in (columns.text, columns.domain):
        if name in schema.names and not _is_text(schema.field(name).type):
            raise DataError(f"{place}: column {name!r} has type {schema.field(name).type}, not text")
    names = dict.fromkeys((columns.text, columns.domain, columns.group))  # the same column may serve as two of them
    return [name for name in names if name in schema.names]


def arrow_documents(
    batches: "Iterator[pa.RecordBatch] | Iterator[pa.Table]", columns: Columns, domain: str, place: str
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


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    # a column of nulls alone has no type; the check of its first row gives the better message
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_kind(kind) for is_kind in strings)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


Reader = Callable[[Path, Columns, str], Iterator[Document]]

# the longest suffix first, so that all of `.jsonl.gz` is removed from a name
READERS: dict[str, Reader] = {
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".txt.gz": read_text,
    ".txt.zst": read_text,
    ".txt": read_text,
    ".md": read_text,
}


def known_suffix(path: Path) -> str | None:
    """The suffix that selects the reader of `path`, or None if there is no reader for it."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)
