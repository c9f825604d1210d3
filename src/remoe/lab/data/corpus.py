"""The dataset that the runs of a pool are trained on, prepared inside the pool."""

from pathlib import Path

from remoe.errors import DataError
from remoe.lab.data.dataset import Dataset, open_dataset
from remoe.lab.data.journal import FORMAT, JOURNAL_NAME, VERSION, ChangedError, Journal
from remoe.lab.data.manifest import MANIFEST_NAME, read_record
from remoe.lab.data.options import PrepareOptions
from remoe.lab.data.preparation import prepare

ADVICE = "delete that folder or use another --pool; runs on the old text are not comparable with new ones"


def open_corpus(corpus: str, pool: Path, vocab_size: int, *, as_prepared: bool) -> Dataset:
    """The dataset of a corpus, prepared if it is missing.

    Args:
        corpus: a folder with train/ and validation/, or any source that `remoe data prepare` accepts.
        pool: the pool, whose folder `data` contains the dataset.
        vocab_size: vocabulary size of the tokenizer to train.
        as_prepared: whether to use a finished dataset as it is, even if the text has changed since.

    Raises:
        DataError: when the text has changed since the dataset was made, or another text has the same name.
    """
    place = Path(corpus)
    if place.exists():  # the same from any working directory
        place = place.resolve()
        corpus = str(place)
    out = pool / "data" / f"{place.resolve().name or 'corpus'}-bpe{vocab_size}"
    train, validation = place / "train", place / "validation"
    held_out = (str(validation),) if train.is_dir() and validation.is_dir() else ()
    sources = (str(train),) if held_out else (corpus,)
    if (out / JOURNAL_NAME).exists():
        request = read_record(out / JOURNAL_NAME, Journal, FORMAT, VERSION).request
        made_from = Path(request["sources"][0])
        if made_from.resolve() not in (place.resolve(), train.resolve()):
            raise DataError(f"{out} was made from {made_from}, not from {sources[0]}: {ADVICE}")
        if as_prepared and (out / MANIFEST_NAME).exists():
            return open_dataset(out)
        # Other names of the same places, such as texts and texts/, are the same text.
        sources, held_out = _as_before(sources, request["sources"]), _as_before(held_out, request["--validation"])
    try:
        # If several of these commands start together, one prepares the data and the others wait for it.
        prepare(PrepareOptions(sources=sources, validation=held_out, out=out, vocab_size=vocab_size), wait=True)
    except ChangedError as error:
        raise DataError(f"the corpus {corpus} has changed since {out} was made: {ADVICE}") from error
    return open_dataset(out)


def _as_before(names: tuple[str, ...], before: list[str]) -> tuple[str, ...]:
    same = [Path(name).resolve() for name in names] == [Path(name).resolve() for name in before]
    return tuple(before) if same else names
