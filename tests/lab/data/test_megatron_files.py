"""Token files of Megatron: read where they are, with their documents, and refused when they do not fit."""

import json
import struct

import numpy as np
import pytest
from small_data import document_texts, make_texts

from remoe.errors import ConfigError, DataError
from remoe.lab.cli.main import main
from remoe.lab.data import TrainBatches, open_dataset
from remoe.lab.data.corpus import open_data

CODES = {"uint16": 8, "int32": 4}


def write_token_files(prefix, documents, dtype="uint16", code=None):
    """Writes documents, each a list of sequences of ids, in the documented layout."""
    sequences = [sequence for document in documents for sequence in document]
    width = 2 if dtype == "uint16" else 4
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{'H' if width == 2 else 'i'}", *sequence))
    lengths, first, places, bounds = [], 0, [], [0]
    for sequence in sequences:
        lengths.append(len(sequence))
        places.append(first)
        first += width * len(sequence)
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype] if code is None else code))
        file.write(struct.pack("<QQ", len(lengths), len(bounds)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(places)}q{len(bounds)}q", *places, *bounds))


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepared / "tokenizer"


@pytest.fixture(scope="module")
def texts():
    return make_texts(60, seed=5)


@pytest.fixture(scope="module")
def documents(opened, texts):
    """Each text in two sequences, of which the second ends with EOS; one document is empty."""
    loaded, found = opened.load_tokenizer(), []
    for text in texts:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        found.append([ids[:7], [*ids[7:], loaded.eos_token_id]])
    return [*found[:3], [], *found[3:]]


@pytest.fixture
def prefix(tmp_path, documents):
    write_token_files(tmp_path / "wiki_text_document", documents)
    return tmp_path / "wiki_text_document"


@pytest.mark.parametrize("dtype", CODES)
def test_documents_are_those_of_the_files_and_the_last_are_held_out(tmp_path, documents, texts, tokenizer, dtype):
    write_token_files(tmp_path / "wiki", documents, dtype)
    dataset = open_data(str(tmp_path / "wiki"), tmp_path / "runs", 0, str(tokenizer))
    train, held_out = document_texts(dataset, dataset.train), document_texts(dataset, dataset.validation)
    assert [text for _, text in train + held_out] == texts
    assert len(held_out) == 2  # 2 % of 60 documents of about one length, in whole documents
    assert {domain for domain, _ in train + held_out} == {"wiki"}
    assert dataset.validation.num_bytes == sum(len(text.encode()) for _, text in held_out)
    shard = dataset.train.shards[0]
    assert shard.tokens.filename == tmp_path / "wiki.bin"
    assert shard.tokens.dtype == np.dtype({"uint16": "<u2", "int32": "<u4"}[dtype])
    windows = TrainBatches(dataset.train, 16, 2, seed=0)
    flat = [token for document in documents for sequence in document for token in sequence]
    assert all(row.tolist() in [flat[i : i + 17] for i in range(0, len(flat), 16)] for row in windows.batch(3))


def test_a_folder_with_both_splits_a_name_of_a_file_and_later_opening(tmp_path, documents, tokenizer, capsys):
    for split, part in (("train", documents[:20]), ("validation", documents[20:25])):
        (tmp_path / "both" / split).mkdir(parents=True)
        write_token_files(tmp_path / "both" / split / "a", part)
    write_token_files(tmp_path / "both" / "train" / "b", documents[30:40])
    made = open_data(str(tmp_path / "both"), tmp_path, 0, str(tokenizer))
    assert made.domains == ("a", "b")
    assert [made.train.num_documents, made.validation.num_documents] == [29, 5]  # without the empty one
    assert "once" in capsys.readouterr().out
    again = open_data(f"{tmp_path}/both/", tmp_path, 0, str(tokenizer))
    assert again.path == made.path
    assert capsys.readouterr().out == ""
    single = open_data(str(tmp_path / "both" / "train" / "b.idx"), tmp_path, 0, str(tokenizer))
    assert single.train.num_documents + single.validation.num_documents == 10
    assert main(["data", "check", str(made.path)]) == 0
    write_token_files(tmp_path / "both" / "train" / "b", documents[30:41])
    assert open_data(str(tmp_path / "both"), tmp_path, 0, str(tokenizer)).path != made.path
    with pytest.raises(DataError, match=r"b\.bin: changed since the dataset was made"):
        open_dataset(made.path)


def test_damage_and_files_that_do_not_fit_are_told_in_a_line(tmp_path, prefix, documents, tokenizer):
    def opening(name=tokenizer):
        return open_data(str(prefix), tmp_path / "runs", 0, None if name is None else str(name))

    with pytest.raises(ConfigError, match="name with --tokenizer"):
        opening(None)
    for change, words in [
        ({"documents": [[[5, 6, 7]], *documents]}, "document 0 does not end with .* --append-eod"),
        ({"code": 5}, "token ids of type 5"),
        ({"documents": [[]]}, "no tokens"),
        ({"documents": documents[:1]}, "a single document"),
    ]:
        write_token_files(prefix, **({"documents": documents} | change))
        with pytest.raises(DataError, match=words):
            opening()
    write_token_files(prefix, documents)
    whole, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    for suffix, content, words in [
        (".idx", whole[:60], "truncated"),
        (".idx", b"x" + whole[1:], "not an index"),
        (".idx", whole[:9] + b"\2" + whole[10:], "version 2"),
        (".idx", whole[:34] + b"\1" + whole[35:], "do not follow one another"),
        (".bin", tokens[:-2], "but its index describes"),
    ]:
        write_token_files(prefix, documents)
        prefix.with_suffix(suffix).write_bytes(content)
        with pytest.raises(DataError, match=words):
            opening()
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_a_changed_token_of_the_same_size_is_found(tmp_path, prefix, tokenizer):
    made = open_data(str(prefix), tmp_path, 0, str(tokenizer))
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.seek(40)
        file.write(b"\1\0")
    assert main(["data", "check", str(made.path)]) == 2


def test_a_run_trains_on_them_and_a_later_one_starts_from_it(tmp_path, prefix, tokenizer, capsys):
    out = tmp_path / "runs" / "mine"
    sizes = ["--seq-len", "16", "--batch-size", "2", "--model.hidden-size", "16", "--model.num-hidden-layers", "1"]
    data = ["--data", str(prefix), "--tokenizer", str(tokenizer)]
    assert main(["train", *data, "--out", str(out), "--steps", "2", "--prompt", "the", *sizes]) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    more = tmp_path / "runs" / "more"
    assert main(["train", "--from", str(out), "--data", str(prefix), "--steps", "0", "--out", str(more)]) == 0
    capsys.readouterr()
    assert main(["train", *data[2:], "--out", str(tmp_path / "no")]) == 2
    assert "--tokenizer is for token files" in capsys.readouterr().err
