"""What is held out is stable, whole, and never all or nothing."""

import random

import pytest

from remoe.errors import DataError
from remoe.lab.data.documents import Document
from remoe.lab.data.holdout import Holdout, HoldoutBuilder


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
    with pytest.raises(
        DataError, match=r"source: a single source item cannot be divided .* a second file by --validation, or a folder"
    ):
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
