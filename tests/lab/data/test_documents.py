"""Files of every kind become the same documents, and errors name the faulty row."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import write_rows

from remoe.errors import DataError
from remoe.lab.data import documents
from remoe.lab.data.documents import Columns, Document
from remoe.lab.data.sources import resolve_source

ROWS = [("first", "x"), ("zweiter \u00fc\U0001f642", "y"), ("", "x"), (" \n", "y"), ("last\r\n", "x")]
KEPT = [("first", "x"), ("zweiter \u00fc\U0001f642", "y"), ("last\r\n", "x")]


def read(path: Path, **columns: str) -> list[Document]:
    return list(resolve_source(str(path), Columns(**columns)).documents())


def pairs(found: list[Document]) -> list[tuple[str, str]]:
    return [(document.text, document.domain) for document in found]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_tables_give_their_rows_without_blank_ones(tmp_path: Path, name: str) -> None:
    assert pairs(read(write_rows(tmp_path / name, ROWS))) == KEPT


def test_parquet_longer_than_a_batch_keeps_order_and_counts_rows(tmp_path: Path) -> None:
    texts: list[str | None] = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=300)
    assert [document.text for document in read(tmp_path / "d.parquet")] == texts
    texts[650] = None
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=300)
    with pytest.raises(DataError, match=r"d\.parquet: row 650: the text is missing"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_reads_every_arrow_text_type(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "d.parquet")
    assert [document.text for document in read(tmp_path / "d.parquet")] == ["a", "b", "a"]


def test_text_file_is_one_document_and_keeps_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "my.notes.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert pairs(read(tmp_path / "my.notes.txt")) == [("one\r\ntwo\n", "my.notes")]


@pytest.mark.parametrize("suffix", [".JSONL", ".Jsonl.GZ"])
def test_suffixes_of_any_case(tmp_path: Path, suffix: str) -> None:
    content = b'{"text": "a"}\n'
    (tmp_path / f"d{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("GZ") else content)
    assert [document.text for document in read(tmp_path / f"d{suffix}")] == ["a"]


@pytest.mark.parametrize("what", ["domain", "group"])
def test_names_that_are_not_unicode_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a", "domain": "d", "group": "g"} | {what: "a\ud800"}) + "\n")
    with pytest.raises(DataError, match=f"line 1: the {what} .* lone surrogate"):
        read(tmp_path / "d.jsonl", domain="domain", group="group")


def test_columns_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"body": "b", "kind": "k", "book": 7, "text": "no"}\n')
    found = read(tmp_path / "d.jsonl", text="body", domain="kind", group="book")
    assert found == [Document("b", "k", "7")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        (b'\n{"text": null}\n', "line 2: the text is missing"),
        (b'{"text": 5}\n', "line 1: the text is of type int"),
        (b'{"body": "a", "n": 1}\n', r"line 1: no column 'text' \(columns present: body, n\)"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"text": "\\ud800"}\n', "line 1: the text .* lone surrogate"),
        (b'{"text": "a", "domain": null}\n', "line 1: the domain is missing"),
        (b'{"text": "a", "domain": "all"}\n', "line 1: 'all' cannot be a domain's name"),
    ],
)
def test_faulty_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"d\.jsonl: {message}") as caught:
        read(tmp_path / "d.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write_rows(tmp_path / name, [(f"text {i} {i * i}", "x") for i in range(2000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"noise" * 100)
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        read(path)


def test_missing_column_names_those_present(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.parquet", ROWS)
    with pytest.raises(DataError, match=r"d\.parquet: no column 'body' \(columns present: text, domain\)"):
        read(path, text="body")
    with pytest.raises(DataError, match="no column 'kind'"):
        read(path, domain="kind")


def test_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: column 'text' .*int64, not text"):
        read(tmp_path / "d.parquet")


def test_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text \(byte 1"):
        read(tmp_path / "latin.txt")


def test_document_sizes_are_utf8_bytes() -> None:
    assert Document("aé🙂", "d").num_bytes == 1 + 2 + 4


@pytest.mark.parametrize("name", ["d.txt.gz", "d.txt.zst", "d.md", "D.TXT.GZ", "d.txt"])
def test_texts_of_other_suffixes(tmp_path: Path, name: str) -> None:
    import zstandard

    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    (tmp_path / name).write_bytes(pack("# Töne\r\n".encode()))
    assert pairs(read(tmp_path / name)) == [("# Töne\r\n", name.partition(".")[0])]
    assert pairs(read(tmp_path)) == [("# Töne\r\n", tmp_path.name)]


def test_csv_has_named_columns_quotes_and_line_breaks_in_fields(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "d.csv").write_text(f'\ufefftext,n,domain\r\n"a, ""b""\n\nc",1,one\r\n\r\n{long},2,two\n ,3,one\n')
    assert pairs(read(tmp_path / "d.csv")) == [('a, "b"\n\nc', "one"), (long, "two")]
    (tmp_path / "e.csv").write_text("body\nb\n")
    assert pairs(read(tmp_path / "e.csv", text="body")) == [("b", "e")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"no column 'text' \(columns present: none\)"),
        (b"a,b\n1,2\n", r"no column 'text' \(columns present: a, b\)"),
        (b"text,n\nx,1\n\ny\n", "line 4: 1 fields, but the first row has 2"),
        (b'text,n\n"x\ny",1\nz,1,2\n', "line 4: 3 fields"),
        (b"text\nx\n\xff\n", "not UTF-8 text"),
        (b'text\n"x\n', "line 2: cannot be read: unexpected end of data"),
        (b"text,text\nx,y\n", "several columns are named 'text'"),
        (b"text,domain\nx,\n", "line 2: the domain is empty"),
    ],
)
def test_a_faulty_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"d\.csv: {message}"):
        read(tmp_path / "d.csv")


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz", "d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet", "d.csv"])
def test_a_text_that_is_too_long_is_named_and_not_read_whole(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 1000)
    rows = [("short", "x"), ("y" * 50_000, "x")]
    if name.startswith("d.txt"):
        content = b"y" * 50_000
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    elif name == "d.csv":
        (tmp_path / name).write_text("text,domain\n" + "".join(f"{text},{domain}\n" for text, domain in rows))
    else:
        write_rows(tmp_path / name, rows)
    with pytest.raises(DataError, match=rf"{name}: .*(longer than|field larger than)"):
        read(tmp_path / name)


def test_little_memory_is_one_line(tmp_path: Path, monkeypatch) -> None:
    def exhausted(*_):
        raise MemoryError
        yield

    monkeypatch.setitem(documents.READERS, ".txt", exhausted)
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(DataError, match=r"d\.txt: too little memory"):
        read(tmp_path / "d.txt")


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "d.txt.gz"])
def test_an_empty_compressed_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: empty, which is not a compressed file"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["text", "domain", "group"])
def test_two_columns_of_one_name_are_named(tmp_path: Path, name: str) -> None:
    names = ["text", "domain", "group", "n", "n", name]
    arrays = [pa.array(["a"])] * len(names)
    pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=rf"d\.parquet: several columns are named '{name}'"):
        read(tmp_path / "d.parquet", group="group")


def test_large_rows_of_parquet_are_read_few_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 30_000)
    texts = [f"{i}" + "".join(map(str, range(i, i + 2000))) for i in range(50)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=40)
    assert documents._rows_at_once(pq.ParquetFile(tmp_path / "d.parquet").metadata) in (3, 4)
    assert [document.text for document in read(tmp_path / "d.parquet")] == texts
    pq.write_table(pa.table({"text": ["a"] * 999}), tmp_path / "d.parquet")
    assert documents._rows_at_once(pq.ParquetFile(tmp_path / "d.parquet").metadata) == documents.ROWS_PER_BATCH
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == []
