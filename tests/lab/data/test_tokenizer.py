"""Tokenizers keep every text exactly, survive saving, and are identified by their fingerprint."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from remoe.errors import DataError
from remoe.lab.data import tokenizer as tokenizers
from remoe.lab.data.tokenizer import (
    LONGEST_RUN,
    Encoder,
    cut_runs,
    load_tokenizer,
    sample_evenly,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
    words_apart,
)

NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\t\n\r\n \x0b\x0c",
    "don't can't . , ! ? it 's",
    "\x00\x01\x7f\x80\xff",
    "\ufeffbyte order mark, \u200bzero width, \u00a0no break, \u2028line",
    "e\u0301 is not \u00e9; \ufb01 is not fi; \u212b",
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈",
    "שלום مرحبا नमस्ते ไทย 한국어 日本語",
    "\U0010ffff\ue000\ufffd\uffff",
    "<|endoftext|>",
    "a<|endoftext|> b <s></s>[UNK]",
    "".join(map(chr, range(0x250))),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(iter(["the router sends the token to the expert"] * 20), 300)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_every_text_survives_the_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.decode(loaded(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert loaded.decode(Encoder(loaded)([text])[0]) == text


def test_trained_tokenizer_has_what_a_language_model_needs(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert vocabulary_size(tokenizer) == len(tokenizer) <= 300
    assert len(tokenizer("the router")["input_ids"]) < 5  # it has learned its words, and adds none of its own


def test_training_is_the_same_every_time(tokenizer: PreTrainedTokenizerBase) -> None:
    again = train_tokenizer(iter(["the router sends the token to the expert"] * 20), 300)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_fingerprint_is_the_same_after_saving_and_use_and_elsewhere(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded("the router sends", truncation=True, max_length=2)
    assert tokenizer_fingerprint(loaded) == fingerprint
    code = (
        "import sys; from transformers import PreTrainedTokenizerFast;"
        "from remoe.lab.data.tokenizer import tokenizer_fingerprint;"
        "print(tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint
    assert tokenizer_fingerprint(train_tokenizer(iter(["the router sends"] * 20), 300)) != fingerprint


def test_spelled_out_end_of_text_does_not_end_a_document(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token_id in tokenizer("a<|endoftext|>")["input_ids"]
    assert tokenizer.eos_token_id not in Encoder(tokenizer)(["a<|endoftext|>"])[0]


def test_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(DataError, match=r"no_eos: has no end-of-text \(EOS\) token"):
        load_tokenizer(tmp_path / "no_eos")


def test_folder_without_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    for missing in (tmp_path / "away", str(tmp_path / "away"), "runs/a/tokenizer"):
        with pytest.raises(DataError, match=r"does not exist$"):
            load_tokenizer(missing)


@pytest.mark.parametrize("size", [10, 5000, 2_000_000])
def test_sample_is_spread_evenly_and_within_its_limit(size: int) -> None:
    texts = [chr(ord("a") + i % 26) * size for i in range(max(26, 2_600_000 // size))]
    total = size * len(texts)
    sample = "".join(sample_evenly(iter(texts), total, total // 4))
    assert 0.9 * total / 4 < len(sample) <= total // 4
    for part in range(4):  # each quarter of the text gives about a quarter of the sample
        start, end = part * len(texts) // 4, (part + 1) * len(texts) // 4
        prefix = "".join(sample_evenly(iter(texts[:end]), total, total // 4))
        assert abs(len(prefix) - end * size / 4) < max(70_000, size * 0.1), (start, end)


def test_sample_of_a_small_text_is_all_of_it() -> None:
    texts = ["é" * 1000, "", "abc"]
    assert "".join(sample_evenly(iter(texts), 2003, 2003)) == "".join(texts)


@pytest.mark.parametrize("letters", ["ACGT", "中文字符" + "".join(map(chr, range(0x4E00, 0x5200))), "-=", " \t"])
def test_long_runs_are_cut_and_nothing_is_lost(letters: str) -> None:
    generator = random.Random(0)
    run = "".join(generator.choices(letters, k=10_000))
    for text in (run, f"a {run}. b", f"x\n{run}\n{run}"):
        pieces = list(cut_runs(text))
        assert "".join(pieces) == text
        assert not any(re.search(r"\w{257}|\s{257}|[^\w\s]{257}", piece) for piece in pieces)
        assert len(pieces) <= 2 + 2 * len(run) / LONGEST_RUN


def test_text_of_usual_words_is_one_piece() -> None:
    for text in (*NASTY[:-1], "word " * 9999, "x" * LONGEST_RUN + " " * LONGEST_RUN + "=" * LONGEST_RUN, ""):
        assert list(cut_runs(text)) == [text]


def test_text_without_spaces_trains_quickly() -> None:
    generator = random.Random(0)
    text = "".join(generator.choices("ACGT", k=200_000))
    begin = time.process_time()
    assert vocabulary_size(train_tokenizer(iter([text]), 2000)) == 2000
    assert time.process_time() - begin < 5  # without the cuts 20 s and more, with them 1 s


def test_an_error_of_the_texts_arrives(tmp_path: Path) -> None:
    def texts():
        yield "some words"
        raise DataError("a faulty row")

    with pytest.raises(DataError, match="a faulty row"):
        train_tokenizer(texts(), 300)


def test_an_interruption_is_heard_while_merges_are_computed() -> None:
    code = """
import random, sys
from remoe.lab.data.tokenizer import train_tokenizer
words = "".join(random.choices("ACGT", k=200_000))
texts = iter([" ".join(words[i : i + 250] for i in range(0, len(words), 250))])
def end():
    yield from texts
    print("reading is done", flush=True)
train_tokenizer(end(), 60_000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        begin = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
        assert time.monotonic() - begin < 2
    assert b"KeyboardInterrupt" in error


def test_the_end_of_text_pads_too(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["router", "the router sends"], padding=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len({len(ids) for ids in batch["input_ids"]}) == 1


@pytest.mark.parametrize("seed", range(8))
def test_long_texts_are_encoded_in_pieces_with_the_same_ids(tokenizer, monkeypatch, seed: int) -> None:
    generator = random.Random(seed)
    parts = [
        *NASTY,
        "the router ",
        "sends\nthe token",
        "\n\n",
        "  a",
        "1 2",
        "½ Ⅷ",
        "it's don't 's",
        " \u0301b",
        "x_ _y",
        "\x1f z",
    ]
    text = "".join(generator.choices(parts, k=300))
    assert len(list(words_apart(text, 50))) > 10
    assert "".join(words_apart(text, 50)) == text
    encode = Encoder(tokenizer)
    expected = encode([text, "short"])
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 800)
    assert [list(ids) for ids in encode([text, "short"])] == expected


def test_only_tokenizers_that_are_known_to_divide_are_given_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    assert Encoder(tokenizer)._divides
    backend = Tokenizer(models.BPE())
    for pre_tokenizer, normalizer in (
        (pre_tokenizers.Metaspace(), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Strip()),
    ):
        backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
        assert not tokenizers._ends_words_at_spaces(json.loads(backend.to_str()))
