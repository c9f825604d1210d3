"""What differs between the options of two runs, and whether it changes what is trained. No torch import."""

from typing import Any

from remoe.lab.nested import flatten
from remoe.lab.training.config import TrainConfig

# Options that have no influence on the trained weights.
_FREE = {"out", "resume", "config", "data", "tokenizer", "log_every", "print_every", "live", "log", "device", "prompt"}
_FREE |= {"mesh", "mesh_timeout", "stream", "text_column"}
_FREE_GROUPS = ("validate.", "checkpoint.")


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The options that differ between two configurations, by dotted name: (old, new), with None for a missing one."""
    flat_old, flat_new = dict(flatten(old.to_dict())), dict(flatten(new.to_dict()))
    pairs = {name: (flat_old.get(name), flat_new.get(name)) for name in {**flat_old, **flat_new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def changes_result(name: str) -> bool:
    """Whether an option, by its dotted name, influences the trained weights; a resumed run may change only others."""
    return name not in _FREE and not name.startswith(_FREE_GROUPS)
