"""Datasets that a command prepares from raw text before it uses them."""

import shlex
from pathlib import Path

from remoe.errors import ConfigError, DataError
from remoe.lab.console import say
from remoe.lab.data.dataset import Dataset, open_dataset
from remoe.lab.data.journal import FORMAT, JOURNAL_NAME, VERSION, ChangedError, Journal
from remoe.lab.data.manifest import MANIFEST_NAME, read_record
from remoe.lab.data.megatron import find_token_files, open_token_files
from remoe.lab.data.options import PrepareOptions
from remoe.lab.data.preparation import prepare
from remoe.lab.data.sources import is_raw

ADVICE = "delete that folder or use another --pool; runs on the old text are not comparable with new ones"


def open_data(data: str, parent: Path, vocab_size: int, tokenizer: str | None = None) -> Dataset:
    """The dataset that `--data` names; one of raw text is prepared in `parent`/data once, and a line says so.

    Text that has changed since is prepared anew, in a folder with the next number: runs on the old text keep theirs.

    Args:
        data: a folder that `prepare` wrote, Megatron's token files, or text as `open_corpus` takes it.
        parent: folder.
        vocab_size: of the tokenizer that is trained for raw text.
        tokenizer: that made the token files.

    Raises:
        DataError: when there is no such data, or the text cannot be prepared.
        ConfigError: when `parent` is inside the folder of the text, or with a tokenizer for other data.
    """
    if files := find_token_files(data):
        return open_token_files(files, parent, tokenizer)
    _check_needless(tokenizer, data)
    if not is_raw(data):
        return open_dataset(data)
    out = first = _place(data, parent, vocab_size)
    if Path(data).is_dir() and out.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(
            f"--data {data}: {out}, where its text would be prepared, is inside it; move the texts into a folder of"
            " their own, or write the run elsewhere with --out"
        )
    number = 1
    while True:
        begun, finished = (out / JOURNAL_NAME).exists(), (out / MANIFEST_NAME).exists()
        if not begun:
            say(f"preparing the text of {data} in {out}; later runs with it find it there")
        try:
            dataset = _open_prepared(data, out, vocab_size, as_prepared=False, quiet=finished)
        except ChangedError:
            if not begun:  # while it was read
                raise
            number += 1
            out = first.with_name(f"{first.name}-{number}")
        else:
            if begun:
                say(f"the text of {data} is prepared in {out}")
            return dataset


def _check_needless(tokenizer: str | None, data: str) -> None:
    """Raises ConfigError where a tokenizer is given with a prepared dataset, which has its own, or with text."""
    if tokenizer is None or (Path(data) / MANIFEST_NAME).exists():
        return
    raise ConfigError(
        f"--tokenizer {tokenizer}: it is for token files of Megatron; text is prepared with a given tokenizer by"
        f" `remoe data prepare {shlex.quote(data)} --out DIR --tokenizer {shlex.quote(tokenizer)}`"
    )


def open_corpus(corpus: str, pool: Path, vocab_size: int, *, as_prepared: bool) -> Dataset:
    """The dataset of a pool's corpus, prepared if it is missing.

    Args:
        corpus: a folder with train/ and validation/, or any source that `remoe data prepare` accepts.
        pool: the pool, whose folder `data` contains the dataset.
        vocab_size: vocabulary size of the tokenizer to train.
        as_prepared: whether to use a finished dataset as it is, even if the text has changed since.

    Raises:
        DataError: when the text has changed since the dataset was made, or another text has the same name.
    """
    out = _place(corpus, pool, vocab_size)
    try:
        return _open_prepared(corpus, out, vocab_size, as_prepared=as_prepared)
    except ChangedError as error:
        raise DataError(f"{error}: {ADVICE}") from error


def _place(corpus: str, parent: Path, vocab_size: int) -> Path:
    place = Path(corpus)
    name = (place.resolve() if place.exists() else place).name or "corpus"
    return parent / "data" / f"{name}-bpe{vocab_size}"


def _open_prepared(corpus: str, out: Path, vocab_size: int, *, as_prepared: bool, quiet: bool = False) -> Dataset:
    """The dataset in `out`, made from this text; raises ChangedError when it was made from another."""
    place = Path(corpus)
    if place.exists():  # the same from any working directory
        place = place.resolve()
        corpus = str(place)
    train, validation = place / "train", place / "validation"
    held_out = (str(validation),) if train.is_dir() and validation.is_dir() else ()
    sources = (str(train),) if held_out else (corpus,)
    if (out / JOURNAL_NAME).exists():
        request = read_record(out / JOURNAL_NAME, Journal, FORMAT, VERSION).request
        made_from = Path(request["sources"][0])
        if made_from.resolve() not in (place.resolve(), train.resolve()):
            raise ChangedError(f"{out} was made from {made_from}, not from {sources[0]}")
        if as_prepared and (out / MANIFEST_NAME).exists():
            return open_dataset(out)
        # Other names of the same places, such as texts and texts/, are the same text.
        sources, held_out = _as_before(sources, request["sources"]), _as_before(held_out, request["--validation"])
    options = PrepareOptions(sources=sources, validation=held_out, out=out, vocab_size=vocab_size, quiet=quiet)
    try:
        prepare(options, wait=True)  # where several commands start together, one prepares and the others wait for it
    except ChangedError as error:
        raise ChangedError(f"the corpus {corpus} has changed since {out} was made") from error
    return open_dataset(out)


def _as_before(names: tuple[str, ...], before: list[str]) -> tuple[str, ...]:
    same = [Path(name).resolve() for name in names] == [Path(name).resolve() for name in before]
    return tuple(before) if same else names
