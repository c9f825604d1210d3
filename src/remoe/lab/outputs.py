"""Files that a user names for a command to write: nothing of another kind is ever overwritten."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from remoe.errors import ConfigError
from remoe.lab.files import atomic_write, disk_errors

_LARGEST_READ = 1 << 26  # bytes; no file that a command writes for its user is larger
_MODEL_FILES = re.compile(
    r"((generation_)?config|training|checksums|shards|tokenizer(_config)?|special_tokens_map|vocab|dataset)\.json"
    r"|(model|training|shard-).*\.(safetensors|json)|README\.md|.*\.py|merges\.txt|.*\.jinja"
)
# What shows the kind of a folder, the kind, and the names in it that are its own.
_FOLDERS = (
    (
        "config.yaml",
        "run",
        re.compile(
            r"config\.yaml|metrics\.jsonl|(start|summary)\.json|sample\.txt|launch\.txt|ranks\.log|checkpoints"
            r"|tensorboard|tokenizer"
        ),
    ),
    ("dataset.json", "dataset", re.compile(r"(dataset|preparation)\.json|.*\.safetensors|tokenizer")),
    ("preparation.json", "dataset", re.compile(r"(dataset|preparation)\.json|.*\.safetensors|tokenizer")),
    ("training.json", "checkpoint", _MODEL_FILES),
    ("config.json", "model", _MODEL_FILES),
    ("tokenizer_config.json", "tokenizer", _MODEL_FILES),
)


def check_output(flag: str, path: Path, holds: Callable[[bytes], bool]) -> None:
    """Raise ConfigError unless a command may write its file here: nothing is there, or a file of the same kind.

    A device or a pipe, such as /dev/stdout, may be named too. `flag` is the option's name, `holds` tells from a
    file's content whether it is of the kind that the command writes.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"{flag} {path}: {parent} is not a folder")
    if whole := _owner(path):
        raise ConfigError(f"{flag} {path}: this file belongs to {whole}; choose another name")
    if not path.exists():
        return
    if not path.is_file():
        if path.is_char_device() or path.is_fifo():
            return
        raise ConfigError(f"{flag} {path} is not a file")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_READ)
    except OSError as error:
        raise ConfigError(f"{flag} {path} exists and cannot be read: {error.strerror}") from error
    if content and not holds(content):
        raise ConfigError(f"{flag} {path} exists and is not a file that this command writes; choose another name")


def json_with(*names: str) -> Callable[[bytes], bool]:
    """For `check_output`: whether a file holds a JSON object that has all these names."""

    def holds(content: bytes) -> bool:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.keys() >= set(names)

    return holds


def is_report(content: bytes) -> bool:
    """For `check_output`: whether a file is a page that `remoe report` wrote."""
    return content.lstrip()[:15].lower() == b"<!doctype html>" and b"<title>Routing of " in content[:1000]


def is_parquet(content: bytes) -> bool:
    """For `check_output`: whether a file is a Parquet file, as `remoe record` writes."""
    return content.startswith(b"PAR1")


def write_output(path: Path, content: bytes) -> None:
    """Write the file that a user named: whole, through links; raises DataError if that fails."""
    if path.exists() and not path.is_file():  # a device: replacing it would delete it
        with disk_errors(path):
            path.write_bytes(content)
    else:
        atomic_write(path.resolve(), content)


def _owner(path: Path) -> str | None:
    """The run, dataset, model or checkpoint that a file of this name and place is part of."""
    for place in (Path(os.path.abspath(path)), path.resolve()):
        for folder in place.parents:
            name = place.relative_to(folder).parts[0]
            for mark, kind, own in _FOLDERS:
                if own.fullmatch(name) and (folder / mark).exists():
                    return f"the {kind} {folder}"
    return None
