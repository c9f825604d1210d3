"""YAML files of options, read strictly and written so that they are read back unchanged."""

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from remoe.errors import ConfigError

LARGEST = 1 << 20  # bytes, of which a second reads a tenth


class StrictLoader(yaml.SafeLoader):
    """Rejects a key that is given twice: plain YAML would silently keep the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for twice in (key for index, key in enumerate(keys) if key in keys[:index]):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class StrictDumper(yaml.SafeDumper):
    """Writes what StrictLoader reads: a word that it would take for a number is quoted."""


# YAML 1.1 reads 1e-3 as a word; people mean a number.
for either in (StrictLoader, StrictDumper):
    either.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def to_yaml(options: dict[str, Any]) -> str:
    """Options as the text of a YAML file, in their order."""
    return yaml.dump(options, Dumper=StrictDumper, sort_keys=False)


def read_yaml(path: str | Path, kind: str) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.
        kind: what error messages call it, such as "experiment".

    Raises:
        ConfigError: in one line, when the file cannot be read or is not valid YAML.
    """
    if Path(path).is_file() and (size := Path(path).stat().st_size) > LARGEST:
        raise ConfigError(f"cannot read {kind} {path}: {size:,} bytes, and a file of options has at most {LARGEST:,}")
    try:
        # Reading a pipe of the file system waits for somebody who writes; a shell's <(command), a link, has one.
        if stat.S_ISFIFO(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe")
        return yaml.load(Path(path).read_text(), StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {kind} {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read {kind} {path}: it is nested too deep") from error
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"cannot read {kind} {path}{where}: {what}") from error
