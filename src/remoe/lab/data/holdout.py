"""Choosing what is held out for validation: whole source items, by a stable hash, some of every domain."""

import hashlib
import heapq
from collections.abc import Iterable

from remoe.errors import DataError
from remoe.lab.data.documents import Document
from remoe.lab.data.manifest import Strict

HASH_RANGE = 1 << 64
ITEMS_REMEMBERED = 4096  # a domain of so many more is divided well enough by the hash alone
OVERSHOOT = 1.5  # an item that takes a domain's share beyond this many times what was asked stays in training


def item_hash(document: Document, seed: int) -> int:
    """A 64-bit number that depends only on the seed and on the item that the document belongs to."""
    # a document without a group goes by its text, so that exact copies fall on one side
    key = f"text:{document.text}" if document.group is None else f"group:{document.group}"
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8, salt=b"holdout", key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


class Holdout(Strict):
    """The rule that says of each document whether it is held out, by the hash of its item alone.

    Hashes below `fraction` of their range are held out, besides those in `always`, and less those in
    `never`.
    """

    seed: int
    fraction: float
    always: frozenset[int]
    never: frozenset[int]

    def holds_out(self, document: Document) -> bool:
        """Whether the document belongs to the validation split."""
        number = item_hash(document, self.seed)
        if number in self.always:
            return True
        return number < self.fraction * HASH_RANGE and number not in self.never


class HoldoutBuilder:
    """Sees every document once, and then makes a `Holdout` that leaves neither split empty.

    Where items are few, a share of them may be almost none of the bytes, or of a domain. So each domain
    with two or more items always gives its lowest hash that is no huge item's, and further ones until
    `fraction` of its bytes are held out; and it keeps its highest for training, unless that must stand for
    another domain, and its huge items.
    """

    def __init__(self, seed: int, fraction: float) -> None:
        self.seed = seed
        self.fraction = fraction
        self._domains: dict[str, _DomainItems] = {}

    def see(self, document: Document, num_bytes: int) -> None:
        """Take a document of so many UTF-8 bytes into account."""
        items = self._domains.setdefault(document.domain, _DomainItems())
        items.add(item_hash(document, self.seed), num_bytes)

    def build(self, sources: Iterable[str]) -> Holdout:
        """Make the rule; raises DataError if all documents belong to one item."""
        domains = self._domains.values()
        lowest, highest = min(items.lowest for items in domains), max(items.highest for items in domains)
        if lowest == highest:
            raise DataError(
                f"{', '.join(sources)}: a single source item cannot be divided into training and validation:"
                " give a second file by --validation, or a folder of several files"
            )
        # no domain gives its highest hash, so the highest of all stays in training
        always = {number for items in domains for number in items.choose(self.fraction)} or {lowest}
        never = {number for items in domains for number in (items.highest, *items.huge(self.fraction))} - always
        return Holdout(seed=self.seed, fraction=self.fraction, always=frozenset(always), never=frozenset(never))


class _DomainItems:
    """Sizes of the items with the lowest hashes of one domain, and the domain's highest hash."""

    def __init__(self) -> None:
        self.bytes = 0
        self.highest = -1
        self._sizes: dict[int, int] = {}
        self._heap: list[int] = []  # the hashes negated, so that the largest is first

    @property
    def lowest(self) -> int:
        return min(self._sizes)

    def add(self, number: int, num_bytes: int) -> None:
        self.bytes += num_bytes
        self.highest = max(self.highest, number)
        if number in self._sizes:
            self._sizes[number] += num_bytes
        elif len(self._heap) < ITEMS_REMEMBERED:
            self._sizes[number] = num_bytes
            heapq.heappush(self._heap, -number)
        elif number < -self._heap[0]:
            self._sizes[number] = num_bytes
            del self._sizes[-heapq.heappushpop(self._heap, -number)]

    def huge(self, fraction: float) -> list[int]:
        """Items that alone are more than may be held out of the domain."""
        return [number for number, size in self._sizes.items() if size > OVERSHOOT * fraction * self.bytes]

    def choose(self, fraction: float) -> list[int]:
        """The lowest hashes that fit, until `fraction` of the bytes are reached; the lowest where none does."""
        wanted = fraction * self.bytes
        chosen: list[int] = []
        taken = 0
        for number in sorted(self._sizes):
            size = self._sizes[number]
            if number == self.highest or (chosen and taken >= wanted):
                break
            if taken + size <= OVERSHOOT * wanted:
                chosen.append(number)
                taken += size
        return chosen or [number for number in [self.lowest] if number != self.highest]
