"""The split is stable, keeps items whole and leaves neither side empty; sources cannot overlap."""

import random
from pathlib import Path

import pytest
from small_data import small_options, write_jsonl

from remoe.errors import ConfigError, DataError
from remoe.lab.data import prepare
from remoe.lab.data.documents import Document
from remoe.lab.data.scan import Holdout, HoldoutBuilder, end_of


def build(documents: list[Document], fraction: float = 0.02, seed: int = 0) -> Holdout:
    builder = HoldoutBuilder(seed, fraction)
    for document in documents:
        builder.see(document, document.num_bytes)
    return builder.build(["source"])


def test_share_is_near_the_fraction_and_independent_of_order() -> None:
    documents = [Document(f"text {i}", "d") for i in range(20_000)]

    def held(order: list[Document], seed: int) -> set[str]:
        holdout = build(order, 0.1, seed)
        return {item.text for item in documents if holdout.holds_out(item)}

    first = held(documents, 0)
    assert 0.09 < len(first) / len(documents) < 0.115  # five standard deviations are 0.011
    assert first == held(random.Random(0).sample(documents, len(documents)), 0)
    assert len(first & held(documents, 1)) < 0.3 * len(first)


@pytest.mark.parametrize("seed", range(20))
def test_every_domain_with_two_items_is_on_both_sides(seed: int) -> None:
    documents = [Document(f"{domain} {i}", domain) for domain in "abc" for i in range(2 + seed % 3)]
    documents.append(Document("single", "lonely"))
    for fraction in (0.001, 0.5, 0.99):
        holdout = build(documents, fraction, seed)
        sides = {(item.domain, holdout.holds_out(item)) for item in documents}
        assert sides == {(domain, side) for domain in "abc" for side in (True, False)} | {("lonely", False)}


def test_domains_of_one_item_each_still_give_both_splits() -> None:
    documents = [Document("one", "a"), Document("two", "b")]
    assert sorted(build(documents).holds_out(item) for item in documents) == [False, True]
    documents = [Document("same", "a"), Document("same", "b")]
    with pytest.raises(DataError, match=r"source: a single source item cannot be divided .*--validation"):
        build(documents)


def test_groups_and_exact_copies_stay_together() -> None:
    grouped = [Document(f"text {i}", "ab"[i % 2], f"group {i // 4}") for i in range(400)]
    copies = [Document(f"text {i % 50}", "c") for i in range(400)]
    holdout = build(grouped + copies, 0.2)
    for name in {item.group for item in grouped}:
        assert len({holdout.holds_out(item) for item in grouped if item.group == name}) == 1
    for text in {item.text for item in copies}:
        assert len({holdout.holds_out(item) for item in copies if item.text == text}) == 1


def test_few_items_give_their_share_of_bytes_without_a_huge_one() -> None:
    documents = [Document(f"{i} " + "x" * 1000, "d", f"g{i}") for i in range(100)]
    documents += [Document("y" * 1_000_000, "e", "huge")] + [
        Document(f"{i} " + "z" * 10_000, "e", f"s{i}") for i in range(99)
    ]
    for seed in range(40):
        holdout = build(documents, 0.05, seed)
        for domain in "de":
            total = sum(item.num_bytes for item in documents if item.domain == domain)
            held = sum(item.num_bytes for item in documents if item.domain == domain and holdout.holds_out(item))
            assert 0.04 * total < held < 0.15 * total


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'], ids=["nothing", "blank"])
def test_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"d\.jsonl: no text found"):
        prepare(small_options(tmp_path / "out", tmp_path / "d.jsonl"))
    full = write_jsonl(tmp_path / "full.jsonl", ["some text"])
    with pytest.raises(DataError, match=r"d\.jsonl: no text found"):
        prepare(small_options(tmp_path / "out", full, validation=(str(tmp_path / "d.jsonl"),)))


def test_the_same_text_in_both_splits_or_twice_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(saved)
    for source in (str(saved), "stdlib"):
        with pytest.raises(DataError, match="is both a training and a validation source"):
            prepare(small_options(tmp_path / "out", source, validation=(source,)))
        with pytest.raises(DataError, match="is named twice"):
            prepare(small_options(tmp_path / "out", source, source))


def test_file_in_both_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "held").mkdir(parents=True)
    write_jsonl(tmp_path / "corpus" / "d.jsonl", ["one", "two"])
    write_jsonl(tmp_path / "corpus" / "held" / "e.jsonl", ["three"])
    held = (str(tmp_path / "corpus" / "held"),)
    with pytest.raises(DataError, match=r"e\.jsonl: is both a training and a validation source"):
        prepare(small_options(tmp_path / "out", tmp_path / "corpus", validation=held))


def test_out_inside_a_source_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", ["one", "two"])
    with pytest.raises(ConfigError, match="is inside the source"):
        prepare(small_options(tmp_path / "out", tmp_path))


@pytest.mark.parametrize(
    ("text", "fraction", "end"),
    [
        ("line one\nline two\nline 3\nend", 0.2, "line 3\nend"),
        ("word " * 20, 0.1, "word word "),
        ("x" * 100, 0.02, "xx"),
        ("你好" * 50, 0.1, "你好" * 5),
        ("ab", 0.02, "b"),
        ("a" + "b" * 9, 0.99, "b" * 9),
    ],
)
def test_the_end_of_a_text_begins_at_a_line_or_a_word(text: str, fraction: float, end: str) -> None:
    cut = end_of(text, fraction)
    assert cut is not None
    assert text[cut:] == end


@pytest.mark.parametrize("text", ["a", " a", "a ", "a" + " " * 99])
def test_a_text_of_which_a_part_would_be_blank_is_not_divided(text: str) -> None:
    assert end_of(text, 0.1) is None
    with pytest.raises(DataError, match="cannot be divided"):
        build([Document(text, "d")])


def test_only_a_document_that_is_alone_is_divided() -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    holdout = build([Document(text, "d", "g")])
    train, held = (holdout.part(Document(text, "d", "g"), split) for split in ("train", "validation"))
    assert train.text + held.text == text
    assert train.text.endswith("\n")
    assert 0.02 * len(text) <= len(held.text) <= 0.04 * len(text)
    assert (train.domain, train.group) == (held.domain, held.group) == ("d", "g")
    assert build([Document(text, "d"), Document("other", "d")]).cut is None
    assert Holdout.model_validate({"seed": 0, "fraction": 0.1, "always": [], "never": []}).cut is None  # of 0.1.0
