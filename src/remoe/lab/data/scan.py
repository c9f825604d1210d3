"""The sources of a preparation, the first pass over them, and the stream of each split's documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remoe.errors import ConfigError, DataError
from remoe.lab.data.documents import Columns, Document
from remoe.lab.data.holdout import Holdout, HoldoutBuilder
from remoe.lab.data.journal import Scan
from remoe.lab.data.manifest import SplitName
from remoe.lab.data.options import PrepareOptions
from remoe.lab.data.progress import Reporter
from remoe.lab.data.sources import FileSource, Signature, Source, files_signature, resolve_source, walk_files


@dataclass(frozen=True)
class Inputs:
    """All that a preparation reads: sources of each split, and the folder of a given tokenizer."""

    train: list[Source]
    validation: list[Source]
    tokenizer: Path | None

    @classmethod
    def resolve(cls, options: PrepareOptions) -> "Inputs":
        """Find the sources that the options name.

        Raises DataError for one that is not there, or a file that would be in both splits.
        """
        columns = Columns(options.text_column, options.domain_column, options.group_column)
        train = [resolve_source(name, columns) for name in options.sources]
        validation = [resolve_source(name, columns) for name in options.validation]
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
        """What tells whether any input has changed, by the names the user gave them."""
        found = {source.name: source.signature() for source in [*self.train, *self.validation]}
        if self.tokenizer is not None:
            found["--tokenizer"] = files_signature(walk_files(self.tokenizer))
        return found

    def documents(self, split: SplitName, holdout: Holdout | None) -> Iterator[Document]:
        """A new pass over the documents of one split; `holdout` divides the training sources, if given."""
        if holdout is None:
            for source in self.validation if split == "validation" else self.train:
                yield from source.documents()
            return
        for source in self.train:
            for document in source.documents():
                if holdout.holds_out(document) == (split == "validation"):
                    yield document


def _places(sources: list[Source]) -> set[str]:
    """What the sources read: files by their resolved paths, anything else by what tells one such source from others."""
    places: set[str] = set()
    for source in sources:
        if isinstance(source, FileSource):
            places |= {str(path.resolve()) for path, _ in source.files}
        else:
            places.add(str(Path(source.name).resolve()) if Path(source.name).exists() else source.name)
    return places


def check_apart(options: PrepareOptions) -> None:
    """Raise ConfigError if the output folder lies in a source folder, which would then read it."""
    out = Path(options.out).resolve()
    for name in (*options.sources, *options.validation):
        path = Path(name)
        if path.is_dir() and out.is_relative_to(path.resolve()):
            raise ConfigError(f"--out {options.out}: lies in the source {name}; write somewhere else")


def scan(inputs: Inputs, options: PrepareOptions, reporter: Reporter) -> Scan:
    """Read every document once, so that faulty rows show before any long work and sizes become known.

    Raises DataError for a faulty row, for sources without text, or with too few items to divide.
    """
    builder = HoldoutBuilder(options.seed, options.validation_fraction)
    train = _scan_split(inputs.train, reporter, None if inputs.validation else builder)
    validation = _scan_split(inputs.validation, reporter, None)
    if not train.documents:
        raise DataError(f"{', '.join(options.sources)}: no text found")
    if inputs.validation and not validation.documents:
        raise DataError(f"{', '.join(options.validation)}: no text found")
    return Scan(
        documents=train.documents + validation.documents,
        bytes=train.bytes + validation.bytes,
        train_bytes=train.bytes,
        domains=sorted(train.domains | validation.domains),
        holdout=None if inputs.validation else builder.build(options.sources),
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
