"""The models of a comparison: each reads the same text, one after the other, so that memory holds one model."""

import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe.errors import ConfigError
from remoe.lab.analysis.record import RoutingRecord, is_record
from remoe.lab.analysis.source import Source, open_source
from remoe.lab.analysis.texts import Batch, RawText, Text, TokenTexts
from remoe.lab.data import Document
from remoe.lab.report.contents import facts, outcome
from remoe.lab.report.several.training import Training, training_of
from remoe.lab.text import short_name
from remoe.lab.training.checkpoint import saved_step
from remoe.lab.training.folder import RunFolder, run_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Compared:
    """A model of a comparison, without its weights.

    Attributes:
        name: of its run, folder or record; no two are the same.
        router: its name.
        record: its routing; None for a model that routes no pairs.
        tokenizer: its own; None if only a record is known.
        facts: by name, to show.
        outcome: sentences on how its training went.
        speed: tokens per second of reading the text and recording it, median over batches; None if it was not read, or
            in a single batch, which includes the start.
        training: what its run recorded; None without a run.
    """

    name: str
    router: str
    record: RoutingRecord | None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    facts: dict[str, str] = field(default_factory=dict)
    outcome: list[str] = field(default_factory=list)
    speed: float | None = None
    training: Training | None = None


def read_all(
    paths: list[str], data: str | None, prompt: str | None, *, max_tokens: int, folder: Path
) -> list[Compared]:
    """Reads a text with each model.

    Args:
        paths: as of `write_report`; the first is the reference.
        data: as of `write_report`; None for the data of the first run among the models.
        prompt: text to read instead of data.
        max_tokens: approximate number of tokens; of raw text, the reference's first ones, and the others read the same
            documents.
        folder: where the records are written.

    Raises:
        ConfigError: for data or a prompt beside records alone, and as `open_source`.
        CheckpointError, DataError: as `open_source`.
    """
    if all(map(is_record, paths)) and (data is not None or prompt is not None):
        raise ConfigError("records are of a text that was read: --data and --prompt do not go with them")
    if data is None and prompt is None:
        data = next((run.load_config().data for run in map(run_at, paths) if run is not None), None)
    documents: list[Document] | None = None
    found = []
    for number, (path, name) in enumerate(zip(paths, _names(paths), strict=True)):
        if is_record(path):
            record = RoutingRecord(Path(path))
            found.append(Compared(name, record.about.router, record, facts=facts(None, record.about, None)))
            continue
        source = open_source(path, data, prompt, max_tokens=max_tokens)
        if isinstance(source.text, RawText):
            documents = documents or _first_documents(source.text, source.tokenizer, max_tokens)
            source = replace(source, text=_same_documents(source, documents))
        found.append(_read(source, name, folder / f"{number}.parquet"))
        del source  # or the next model would be loaded beside it
    return found


def _read(source: Source, name: str, file: Path) -> Compared:
    step = saved_step(source.checkpoint) if source.run else None
    timed = _Timed(source.text)
    record = replace(source, text=timed).record(file) if source.mixture else None
    return Compared(
        name,
        record.about.router if record else source.model.config.router,
        record,
        source.tokenizer,
        facts(source, record and record.about, step) | {"reads": f"windows of {source.text.seq_len:,} tokens"},
        outcome(source.run, step),
        statistics.median(timed.rates[1:]) if len(timed.rates) > 1 else None,
        training_of(source, step),
    )


class _Timed:
    """A text that measures how fast its batches are taken, in tokens per second."""

    def __init__(self, text: Text) -> None:
        self.text, self.seq_len, self.identity = text, text.seq_len, text.identity
        self.rates: list[float] = []

    def batches(self, rows: int) -> Iterator[Batch]:
        for batch in self.text.batches(rows):
            started = time.perf_counter()
            yield batch
            self.rates.append(int(batch.mask_NS.sum()) / (time.perf_counter() - started))


def _first_documents(text: RawText, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[Document]:
    """The documents with the first tokens; the last one is cut."""
    texts, left, found = TokenTexts(tokenizer), max_tokens, []
    for document in text.documents():
        ids = text.encode([document.text])[0]
        if len(ids) > left:
            document = replace(document, text="".join(texts(ids[:left])))
        found.append(document)
        left -= len(ids) + 1
        if left <= 0:
            break
    return found


def _same_documents(source: Source, documents: list[Document]) -> RawText:
    text: Any = source.text
    return RawText(lambda: documents, source.tokenizer, text.seq_len, None, text.identity["source"])


def run_at(path: str) -> RunFolder | None:
    run = RunFolder(path)
    return run if run.config.exists() else run_of(Path(path))


def _names(paths: list[str]) -> list[str]:
    """The last part of each path that tells it from the others, or its number behind it."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    whole = [path.with_suffix("") if is_record(path) else path for path in whole]
    for parts in (1, 2, 3):
        names = [short_name(re.sub(r"\s+", " ", "/".join(path.parts[-parts:]))) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {short_name(path.name, 30)}" for number, path in enumerate(whole, start=1)]
