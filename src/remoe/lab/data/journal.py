"""`preparation.json`: the steps that a preparation has finished, so that it can resume after a kill."""

import json
from pathlib import Path
from typing import Any, Literal

from remoe.errors import DataError
from remoe.lab.data.manifest import FORMAT as DATASET_FORMAT
from remoe.lab.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    ShardRecord,
    SplitName,
    Strict,
    read_record,
    read_shard,
    shard_name,
)
from remoe.lab.data.options import PrepareOptions
from remoe.lab.data.scan import Scan
from remoe.lab.files import TEMPORARY, Signature, atomic_write, remove, temporary_name

JOURNAL_NAME = "preparation.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT = "remoe-preparation"
VERSION = 1


class ChangedError(DataError):
    """The text or the arguments have changed since the preparation in a folder began."""


class Journal(Strict):
    """The request that a folder fulfils, and how much of the work is done."""

    format: Literal["remoe-preparation"] = FORMAT
    version: Literal[1] = VERSION
    request: dict[str, Any]
    inputs: dict[str, Signature]
    scan: Scan
    tokenizer_fingerprint: str | None = None
    shards: dict[SplitName, list[ShardRecord]]
    finished_splits: tuple[SplitName, ...] = ()
    finished: bool = False

    def write(self, folder: Path) -> None:
        """Replace the folder's journal with this one, atomically."""
        content = json.dumps(self.model_dump(mode="json"))
        atomic_write(folder / JOURNAL_NAME, content.encode())

    def with_shard(self, split: SplitName, record: ShardRecord) -> "Journal":
        """A copy of this journal with one more finished shard."""
        return self.model_copy(update={"shards": {**self.shards, split: [*self.shards[split], record]}})

    def with_split(self, split: SplitName) -> "Journal":
        """A copy of this journal with one more finished split."""
        return self.model_copy(update={"finished_splits": (*self.finished_splits, split)})


def describe_request(options: PrepareOptions) -> dict[str, Any]:
    """The options that determine the result, by the names of their flags."""
    request: dict[str, Any] = {
        "sources": list(options.sources),
        "--validation": list(options.validation),
        "--tokenizer": options.tokenizer,
        "--text-column": options.text_column,
        "--domain-column": options.domain_column,
        "--group-column": options.group_column,
        "--shard-tokens": options.shard_tokens,
    }
    if options.chat:
        request["--chat"] = True
    if options.tokenizer is None:
        request["--vocab-size"] = options.vocab_size
        request["--tokenizer-sample-mb"] = options.tokenizer_sample_mb
    if not options.validation:
        request["--validation-fraction"] = options.validation_fraction
        request["--seed"] = options.seed
    return request


def find_journal(folder: Path) -> Journal | None:
    """The journal of an earlier preparation in `folder`, or None if the folder is empty.

    Raises DataError if the folder contains anything else.
    """
    if (folder / JOURNAL_NAME).exists():
        return read_record(folder / JOURNAL_NAME, Journal, FORMAT, VERSION)
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder}: contains a dataset whose {JOURNAL_NAME} is missing; --overwrite makes a new one")
    # a kill during the first write of the journal leaves only its temporary file
    foreign = sorted(path.name for path in folder.iterdir() if path.name != temporary_name(JOURNAL_NAME))
    if foreign:
        raise DataError(f"{folder}: not empty and not made by `remoe data prepare` (it contains {foreign[0]})")
    return None


def check_same(folder: Path, journal: Journal, request: dict[str, Any], inputs: dict[str, Signature]) -> None:
    """Raise ChangedError unless the journal is of this request and its sources are unchanged."""
    state = "finished" if journal.finished else "unfinished"
    advice = "use --overwrite to replace it, or another --out"
    for name in {**request, **journal.request}:
        old, new = journal.request.get(name), request.get(name)
        if old != new:
            raise ChangedError(
                f"{folder}: contains a{'n' * (state[0] == 'u')} {state} preparation with different arguments"
                f" ({name}: {old!r} then, {new!r} now); {advice}"
            )
    for name in inputs:
        if inputs[name] != journal.inputs.get(name):
            changed = _first_difference(journal.inputs.get(name, []), inputs[name])
            raise ChangedError(f"{folder}: its source {name} has changed since then ({changed}); {advice}")


def check_replaceable(folder: Path) -> None:
    """Raise DataError unless `folder` is empty or was written by `prepare`."""
    ours = [(folder / JOURNAL_NAME, FORMAT), (folder / MANIFEST_NAME, DATASET_FORMAT)]
    present = [(path, kind) for path, kind in ours if path.exists()]
    if not present:
        find_journal(folder)
    for path, kind in present:
        if not _has_format(path, kind):
            raise DataError(f"{path}: not made by `remoe data prepare`; use another --out")


def clean(folder: Path, journal: Journal) -> None:
    """Remove files of a preparation that the journal does not list, and nothing else."""
    kept = {JOURNAL_NAME, *(shard.file for shards in journal.shards.values() for shard in shards)}
    if journal.tokenizer_fingerprint is not None:
        kept.add(TOKENIZER_FOLDER)
    for path in sorted(folder.iterdir()):
        if path.name not in kept and is_own(path.name):
            remove(path)


def check_shards(folder: Path, journal: Journal) -> None:
    """Raise DataError if a shard that the journal lists as finished is missing or damaged."""
    for shards in journal.shards.values():
        for record in shards:
            try:
                shard = read_shard(folder / record.file)
            except DataError as error:
                raise DataError(f"{error}; use --overwrite to start over") from None
            if shard.header.sha256 != record.sha256:
                raise DataError(f"{shard.path}: was replaced; use --overwrite to start over")


def is_own(name: str) -> bool:
    """Whether a preparation writes a file or folder of this name."""
    if name.endswith(TEMPORARY):
        name = name.removeprefix(".").removesuffix(TEMPORARY)
    if name in (JOURNAL_NAME, MANIFEST_NAME, TOKENIZER_FOLDER):
        return True
    split, _, rest = name.partition("-")
    number = rest.removesuffix(".safetensors")
    return split in SPLITS and number.isdecimal() and name == shard_name(split, int(number))


def _has_format(path: Path, kind: str) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == kind


def _first_difference(old: Signature, new: Signature) -> str:
    before, now = {str(entry[0]): entry for entry in old}, {str(entry[0]): entry for entry in new}
    name = next(path for path in sorted({*before, *now}) if before.get(path) != now.get(path))
    if name not in before:
        return f"{name} is new"
    return f"{name} is gone" if name not in now else f"{name} was modified"
