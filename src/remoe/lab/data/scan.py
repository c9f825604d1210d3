"""The first pass over the sources: what they contain, and which items are held out for validation.

Whole source items are held out, chosen by a stable hash, some from every domain.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from remoe.errors import ConfigError, DataError
from remoe.lab.console import Reporter
from remoe.lab.data.documents import READERS, Columns, Document, is_blank, known_suffix, read_jsonl
from remoe.lab.data.manifest import SplitName, Strict
from remoe.lab.data.options import PrepareOptions
from remoe.lab.data.sources import FileSource, Source, resolve_source
from remoe.lab.files import Signature, files_signature, walk_files

HASH_RANGE = 1 << 64
ITEMS_REMEMBERED = 4096  # in a domain of more items the hash alone divides well enough
OVERSHOOT = 1.5  # an item that would exceed this multiple of a domain's target share stays in training


def item_hash(document: Document, seed: int) -> int:
    """A 64-bit number that depends only on the seed and on the item that the document belongs to."""
    # a document without a group is identified by its text, so that exact copies are on the same side
    key = f"text:{document.text}" if document.group is None else f"group:{document.group}"
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8, salt=b"holdout", key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


class Holdout(Strict):
    """The rule that decides, from the hash of its item alone, whether a document is held out.

    Items whose hash is below `fraction` of the hash range are held out, plus those in `always`, minus those
    in `never`. A document that is alone is divided instead: its characters from `cut` on are held out.
    """

    seed: int
    fraction: float
    always: frozenset[int]
    never: frozenset[int]
    cut: int | None = None

    def part(self, document: Document, split: SplitName) -> Document | None:
        """What the split has of a document: all of it, or its beginning or end, or None."""
        if self.cut is not None:
            text = document.text[self.cut :] if split == "validation" else document.text[: self.cut]
            return replace(document, text=text)
        return document if self.holds_out(document) == (split == "validation") else None

    def holds_out(self, document: Document) -> bool:
        """Whether the document belongs to the validation split."""
        number = item_hash(document, self.seed)
        if number in self.always:
            return True
        return number < self.fraction * HASH_RANGE and number not in self.never


class HoldoutBuilder:
    """Sees every document once, then makes a `Holdout` that leaves neither split empty.

    With few items, a share of the items may hold almost none of the bytes, or miss a domain. Each domain with
    two or more items therefore holds out its lowest hash that is not a huge item, and further ones until
    `fraction` of its bytes are held out. It keeps its huge items for training, and its highest hash too unless
    another domain must hold that one out.
    """

    def __init__(self, seed: int, fraction: float, *, divides: bool = True) -> None:
        self.seed = seed
        self.fraction = fraction
        self._divides = divides  # whether a document that is alone may be divided
        self._domains: dict[str, _DomainItems] = {}
        self._documents = 0
        self._cut: int | None = None

    def see(self, document: Document, num_bytes: int) -> None:
        """Take a document of this many UTF-8 bytes into account."""
        self._documents += 1
        alone = self._documents == 1 and self._divides
        self._cut = end_of(document.text, self.fraction) if alone else None
        items = self._domains.setdefault(document.domain, _DomainItems())
        items.add(item_hash(document, self.seed), num_bytes)

    def build(self, sources: Iterable[str]) -> Holdout:
        """Make the rule; raises DataError if several documents belong to one item, or one is too short to divide."""
        if self._cut is not None:
            return Holdout(seed=self.seed, fraction=self.fraction, always=frozenset(), never=frozenset(), cut=self._cut)
        domains = self._domains.values()
        lowest, highest = min(items.lowest for items in domains), max(items.highest for items in domains)
        if lowest == highest:
            raise DataError(
                f"{', '.join(sources)}: a single source item cannot be divided into training and validation;"
                " give a second file with --validation, or a folder of several files"
            )
        # no domain holds out its own highest hash, so the highest of all stays in training
        always = {number for items in domains for number in items.choose(self.fraction)} or {lowest}
        never = {number for items in domains for number in (items.highest, *items.huge(self.fraction))} - always
        return Holdout(seed=self.seed, fraction=self.fraction, always=frozenset(always), never=frozenset(never))


def end_of(text: str, fraction: float) -> int | None:
    """Where about the last `fraction` of a text begins, if possible after a line or a word; None if a part is blank."""
    share = max(1, min(round(fraction * len(text)), len(text) - 1))
    latest = len(text) - share
    breaks = (text.rfind(sign, max(0, latest - share), latest) for sign in "\n ")
    cut = next((place + 1 for place in breaks if place >= 0), latest)
    return None if is_blank(text[:cut]) or is_blank(text[cut:]) else cut


class _DomainItems:
    """Sizes of the items with the lowest hashes of one domain, and the domain's highest hash."""

    def __init__(self) -> None:
        self.bytes = 0
        self.highest = -1
        self._sizes: dict[int, int] = {}
        self._heap: list[int] = []  # negated hashes, so that the largest comes first

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
        """Items that alone exceed what may be held out of the domain."""
        return [number for number, size in self._sizes.items() if size > OVERSHOOT * fraction * self.bytes]

    def choose(self, fraction: float) -> list[int]:
        """The lowest hashes that fit, until `fraction` of the bytes is reached; the very lowest if none fits."""
        target = fraction * self.bytes
        chosen: list[int] = []
        taken = 0
        for number in sorted(self._sizes):
            size = self._sizes[number]
            if number == self.highest or (chosen and taken >= target):
                break
            if taken + size <= OVERSHOOT * target:
                chosen.append(number)
                taken += size
        return chosen or [number for number in [self.lowest] if number != self.highest]


class Scan(Strict):
    """What the first pass over the sources found: sizes in UTF-8 bytes, and the rule for the split."""

    documents: int
    bytes: int
    train_bytes: int  # of the training sources, including what is held out of them
    domains: list[str]
    holdout: Holdout | None  # None with validation sources


@dataclass(frozen=True)
class Inputs:
    """Everything that a preparation reads: the sources of each split, and the folder of a given tokenizer."""

    train: list[Source]
    validation: list[Source]
    tokenizer: Path | None

    @classmethod
    def resolve(cls, options: PrepareOptions) -> "Inputs":
        """Find the sources that the options name.

        Raises DataError for a source that does not exist, is named twice, or would be in both splits.
        """
        text = "messages" if options.chat and options.text_column == "text" else options.text_column
        columns = Columns(text, options.domain_column, options.group_column, options.chat)
        train = [resolve_source(name, columns) for name in options.sources]
        validation = [resolve_source(name, columns) for name in options.validation]
        for source in (*train, *validation) if options.chat else ():
            if not isinstance(source, FileSource) or any(
                READERS[known_suffix(f)] is not read_jsonl for f, _ in source.files
            ):
                raise DataError(f"{source.name}: --chat reads .jsonl files alone")
        shared = _places(train) & _places(validation)
        if shared:
            raise DataError(f"{min(shared)}: is both a training and a validation source")
        for sources in (train, validation):
            for index, source in enumerate(sources):
                if again := _places([source]) & _places(sources[:index]):
                    raise DataError(f"{min(again)}: is named twice")
        tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
        return cls(train, validation, tokenizer if tokenizer is not None and tokenizer.is_dir() else None)

    def signatures(self) -> dict[str, Signature]:
        """Signatures of all inputs, which differ if one has changed, by the names that the user gave."""
        found = {source.name: source.signature() for source in [*self.train, *self.validation]}
        if self.tokenizer is not None:
            found["--tokenizer"] = files_signature(walk_files(self.tokenizer))
        return found

    def documents(self, split: SplitName, holdout: Holdout | None) -> Iterator[Document]:
        """A new pass over the documents of one split; `holdout`, if given, divides the training sources."""
        if holdout is None:
            for source in self.validation if split == "validation" else self.train:
                yield from source.documents()
            return
        for source in self.train:
            for document in source.documents():
                part = holdout.part(document, split)
                if part is not None:
                    yield part


def check_apart(options: PrepareOptions) -> None:
    """Raise ConfigError if the output folder is inside a source folder, which would then read it."""
    out = Path(options.out).resolve()
    for name in (*options.sources, *options.validation):
        path = Path(name)
        if path.is_dir() and out.is_relative_to(path.resolve()):
            raise ConfigError(f"--out {options.out}: is inside the source {name}; choose another folder")


def scan(inputs: Inputs, options: PrepareOptions, reporter: Reporter) -> Scan:
    """Read every document once, to find faulty rows before any long work and to learn the sizes.

    Raises DataError for a faulty row, for sources without text, or with too few items to divide.
    """
    builder = HoldoutBuilder(options.seed, options.validation_fraction, divides=not options.chat)
    train = _scan_split(inputs.train, reporter, None if inputs.validation else builder)
    validation = _scan_split(inputs.validation, reporter, None)
    if not train.documents:
        raise DataError(f"{', '.join(options.sources)}: no text found")
    if inputs.validation and not validation.documents:
        raise DataError(f"{', '.join(options.validation)}: no text found")
    holdout = None if inputs.validation else builder.build(options.sources)
    divided = holdout is not None and holdout.cut is not None
    if divided:
        reporter.line(f"all text is one document: the end, {options.validation_fraction:.3g} of it, is held out")
    return Scan(
        documents=train.documents + validation.documents + divided,  # its end is a second document
        bytes=train.bytes + validation.bytes,
        train_bytes=train.bytes,
        domains=sorted(train.domains | validation.domains),
        holdout=holdout,
    )


@dataclass
class _Totals:
    documents: int
    bytes: int
    domains: set[str]


def _scan_split(sources: list[Source], reporter: Reporter, builder: HoldoutBuilder | None) -> _Totals:
    totals = _Totals(0, 0, set())
    with reporter.task("reading") as advance:
        for source in sources:
            for document in source.documents():
                size = document.num_bytes
                totals.documents += 1
                totals.bytes += size
                totals.domains.add(document.domain)
                if builder is not None:
                    builder.see(document, size)
                advance(size)
            note = source.note()
            if note is not None:
                reporter.line(note)
    return totals


def _places(sources: list[Source]) -> set[str]:
    """What the sources read: the resolved paths of files, otherwise a name that identifies the source."""
    places: set[str] = set()
    for source in sources:
        if isinstance(source, FileSource):
            places |= {str(path.resolve()) for path, _ in source.files}
        else:
            places.add(str(Path(source.name).resolve()) if Path(source.name).exists() else source.name)
    return places
