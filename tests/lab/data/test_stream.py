"""Streams: the windows are those of the text in its order, on every mesh and after every interruption."""

import csv
import json

import numpy as np
import pytest
from small_data import document_texts, make_texts, write_jsonl, write_rows

from remoe.errors import CheckpointError, ConfigError, DataError
from remoe.lab.data import StreamBatches, open_dataset, stream, stream_batches
from remoe.lab.data.documents import Document
from remoe.lab.data.stream import HOLDOUT, open_stream, reopen
from remoe.lab.data.stream_batches import newest_state

S, B, BLOCK, FILES = 16, 8, 6, 4  # a step's two rows of a part may lie in two blocks, but blocks end between steps too


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream_batches, "BLOCK", BLOCK)
    monkeypatch.setattr(stream_batches, "CHARACTERS", 1000)


@pytest.fixture(scope="module")
def texts():
    return [make_texts(15 + file, seed=file, words=8) for file in range(FILES)]


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepared / "tokenizer"


@pytest.fixture
def source(tmp_path, texts):
    (tmp_path / "texts[1]").mkdir()  # brackets are a pattern for `datasets`
    for file, lines in enumerate(texts):
        write_jsonl(tmp_path / "texts[1]" / f"{file}.jsonl", ["", *lines])
    return tmp_path / "texts[1]"


@pytest.fixture
def dataset(source, tmp_path, tokenizer):
    return open_stream(str(source), "text", tmp_path / "runs", tokenizer)


def batches(dataset):
    return StreamBatches(dataset, S, B, seed=3)


def is_held_out(text):
    return HOLDOUT.holds_out(Document(text, "text"))


def expected_windows(dataset, texts, blocks):
    """The windows of each block of one part, whose documents are these texts, read again and again."""
    loaded, tokens = dataset.load_tokenizer(), []
    while len(tokens) < blocks * BLOCK * S + 1:
        for text in texts:
            tokens += [*loaded(text, add_special_tokens=False)["input_ids"], loaded.eos_token_id]
    starts = range(0, blocks * BLOCK * S, S)
    windows = [tuple(tokens[start : start + S + 1]) for start in starts]
    return [windows[i : i + BLOCK] for i in range(0, len(windows), BLOCK)]


def test_each_part_reads_its_files_in_order_without_the_held_out_documents(dataset, texts):
    held_out = {text for _, text in document_texts(dataset, dataset.validation)}
    assert held_out == {text for lines in texts for text in lines if is_held_out(text)}
    assert 0 < len(held_out) < 6
    read = batches(dataset)
    assert read.parts == FILES
    steps = 4 * BLOCK // 2  # four blocks of every part, which are more than an epoch
    rows_SBT = np.stack([read.batch(step).numpy() for step in range(steps)])
    for part, lines in enumerate(texts):
        found = rows_SBT[:, 2 * part : 2 * part + 2].reshape(-1, S + 1)
        kept = [text for text in lines if text not in held_out]
        for block, expected in enumerate(expected_windows(dataset, kept, 4)):
            rows = [tuple(row) for row in found[block * BLOCK : (block + 1) * BLOCK].tolist()]
            assert sorted(rows) == sorted(expected)
            assert rows != expected


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_read_their_own_rows_and_any_mesh_continues_from_their_states(dataset, ranks, monkeypatch):
    opened, steps = [], 7
    whole = batches(dataset)
    rows_of = [range(rank * B // ranks, (rank + 1) * B // ranks) for rank in range(ranks)]
    several = [batches(dataset) for _ in rows_of]
    original = stream.TextStream.documents
    monkeypatch.setattr(
        stream.TextStream, "documents", lambda self, *key: opened.append(key[:2]) or original(self, *key)
    )
    several[0].batch(0, rows_of[0])
    assert {part for part, _ in opened} == {row // 2 for row in rows_of[0]}
    for step in range(steps):
        expected = whole.batch(step)
        for rows, read in zip(rows_of, several, strict=True):
            assert read.batch(step, rows).tolist() == expected[rows.start : rows.stop].tolist()
    state = json.loads(json.dumps(newest_state([read.state() for read in several])))
    assert all(place["block"] == steps * 2 // BLOCK for place in state)
    assert state == whole.state()
    resumed = batches(dataset)
    resumed.load_state(state)
    assert [resumed.batch(step).tolist() for step in range(steps, 40)] == [
        whole.batch(step).tolist() for step in range(steps, 40)
    ]


def test_a_resumed_part_reads_neither_earlier_files_nor_documents_again(tmp_path, texts, tokenizer, monkeypatch):
    for file, lines in enumerate(texts):
        write_jsonl(tmp_path / f"{file}.jsonl", lines)
    dataset = open_stream(str(tmp_path), "text", tmp_path / "runs", tokenizer)
    read = StreamBatches(dataset, S, 1, seed=0)  # all files in one part
    first = [read.batch(step).tolist() for step in range(60)]
    (state,) = read.state()
    assert state["source"]["examples_iterable"]["examples_iterable"]["shard_idx"] > 0
    documents = reopen(dataset.manifest.stream).documents(0, 1, state["source"])
    _, document = next(documents)
    begun = [text for lines in texts for text in lines].index(document.text)
    assert begun > 15
    resumed = StreamBatches(dataset, S, 1, seed=0)
    resumed.load_state([state])
    assert resumed.batch(59).tolist() == first[59]


def test_every_format_gives_the_same_windows(tmp_path, texts, tokenizer):
    found = []
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        (tmp_path / suffix).mkdir()
        for file, lines in enumerate(texts):
            write_rows(tmp_path / suffix / f"{file}{suffix}", [(text, "d") for text in lines])
        read = batches(open_stream(str(tmp_path / suffix), "text", tmp_path / "runs", tokenizer))
        read.batch(0)
        for step in range(12):
            rows = read.batch(step).tolist() if step in (0, 11) else []
            found.append((suffix, step, rows))
    for step in (0, 11):
        assert len({str(rows) for _, at, rows in found if at == step}) == 1


def test_an_opened_dataset_is_found_again_and_a_changed_source_is_refused(dataset, source, tmp_path, tokenizer):
    again = open_dataset(dataset.path)
    assert again.streamed
    assert open_stream(str(source), "text", tmp_path / "runs", tokenizer).fingerprint == again.fingerprint
    with pytest.raises(CheckpointError, match="no state of this stream"):
        batches(again).load_state(None)
    with pytest.raises(CheckpointError, match="damaged"):
        batches(again).load_state(batches(again).state()[1:])
    write_jsonl(source / "0.jsonl", ["other text"])
    with pytest.raises(DataError, match="has changed"):
        batches(again)


def test_a_dataset_of_the_hub_is_known_by_its_addresses(source, tmp_path, tokenizer, monkeypatch):
    """The hub's client is replaced by one that finds local files."""
    import datasets

    asked, load = [], datasets.load_dataset_builder

    def hub(name, config):
        asked.append((name, config))
        return load("json", data_files={"held": [f"{source.parent}/texts[[]1]/*.jsonl"]})

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    dataset = open_stream("hf:some/name:en:held", "text", tmp_path / "runs", tokenizer)
    assert asked == [("some/name", "en")]
    assert dataset.path.name.startswith("name-stream-")
    assert dataset.manifest.stream.source == "hf:some/name:en:held"
    assert batches(dataset).batch(0).shape == (B, S + 1)
    with pytest.raises(DataError, match="hf:some/name: cannot be read as a stream"):
        open_stream("hf:some/name", "text", tmp_path / "runs", tokenizer)  # it has no split `train`
    write_jsonl(source / "4.jsonl", ["another file"])
    with pytest.raises(DataError, match="has changed"):
        batches(dataset)


def test_what_cannot_be_streamed_is_refused_in_one_line(tmp_path, source, texts, tokenizer):
    from datasets import Dataset

    def refused(data, words, error=DataError, column="text", tokenizer=tokenizer):
        with pytest.raises(error, match=words) as raised:
            open_stream(str(data), column, tmp_path / "runs", tokenizer)
        assert "\n" not in str(raised.value)

    refused(source, "--tokenizer", ConfigError, tokenizer=None)
    refused(source, "no column 'body'.*columns present: text", column="body")
    refused(tmp_path / "nowhere", "no such file or folder")
    refused(f"hf:{source}", "without `hf:`")
    Dataset.from_dict({"text": texts[0]}).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", "leave out --stream")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("text")
    refused(tmp_path / "plain", "no file that can be streamed")
    write_jsonl(tmp_path / "plain" / "a.jsonl", texts[0][:1])
    refused(tmp_path / "plain", "too few documents")
    (tmp_path / "plain" / "b.csv").write_text("text\nsome\n")
    refused(tmp_path / "plain", "several kinds")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(tmp_path / "broken", "cannot be read")
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    refused(tmp_path / "broken", "missing")


def test_later_rows_may_have_other_keys_and_words_are_not_taken_for_missing_or_numbers(tmp_path):
    """`datasets` fixes the columns of JSON by its first rows, and pandas reads "NA" and digits otherwise."""
    for name in ("json", "csv"):
        (tmp_path / name).mkdir()
    words = make_texts(20, seed=5, words=8)
    rows = [{"text": text, "meta": None} for text in words] + [{"text": "last words", "meta": {"a": 1}, "new": 2}]
    (tmp_path / "json" / "0.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    with open(tmp_path / "csv" / "0.csv", "w", newline="") as file:
        csv.writer(file).writerows([text] for text in ["text", *words, "NA", "", "12", "null"])
    for name, ends in (("json", ["last words"]), ("csv", ["NA", "12", "null"])):
        source = stream._find(str(tmp_path / name), "text")
        found = [document.text for _, document in source.documents(0, 1) if document is not None]
        assert found == [*words, *ends]
