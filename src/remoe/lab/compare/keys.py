"""The key of a run: a hash of the options that influence its result, by which its folder and record are found."""

import functools
import hashlib
import json
from typing import Any

from remoe.lab.nested import flatten
from remoe.lab.training.changes import changes_result
from remoe.lab.training.config import FROM, TrainConfig, config_from_dict
from remoe.routing import ROUTERS, router_options

# Options that version 0.1.0 had elsewhere: today's name, and the old default. A run's key hashes the names and values
# of 0.1.0, so that the runs and records of 0.1.0 are found.
FORMER_NAMES: dict[str, tuple[str, Any]] = {
    "model.experts_backend": ("model.backend", "auto"),
    "model.load_balance": ("router_options.load_balance", True),
    "model.max_experts_per_token": ("router_options.max_experts_per_token", None),
}
BACKENDS_0_1_0 = {"cpu": "loop"}  # today's name of a backend, and the one of 0.1.0
# Options whose value in a preset has changed since 0.1.0: the value that the runs of 0.1.0 have.
PRESETS_CHANGED = {"model.router_std": None}


def key_of(config: TrainConfig) -> str:
    """The key of a run with these options, the same as in version 0.1.0 (see FORMER_NAMES)."""
    return _hash(_named_in_0_1_0(config))


def other_keys_of(config: TrainConfig) -> list[str]:
    """Keys that the same run may have had in version 0.1.0 in addition to `key_of`.

    In 0.1.0 `load_balance` and `max_experts_per_token` could also be set in `router_options`, and `model.load_balance:
    false` could be set for routers without load balancing, which ignored it.
    """
    values, keys = _named_in_0_1_0(config), []
    moved = {
        old: new
        for old, (new, _) in FORMER_NAMES.items()
        if new.startswith("router_options.") and new.partition(".")[2] in config.router_options
    }
    if moved:
        given = {new: config.router_options[new.partition(".")[2]] for new in moved.values()}
        keys.append(_hash({name: value for name, value in values.items() if name not in moved} | given))
    if config.router in ROUTERS and "load_balance" not in router_options(ROUTERS[config.router]):
        keys.append(_hash(values | {"model.load_balance": False}))
    return keys


@functools.cache
def _preset_options(preset: str) -> dict[str, Any]:
    return dict(flatten(config_from_dict({"preset": preset}, "preset").to_dict()))


def _named_in_0_1_0(config: TrainConfig) -> dict[str, Any]:
    """The options that the key depends on, under the names that they had in version 0.1.0."""
    names = {new: old for old, (new, _) in FORMER_NAMES.items()}
    defaults = {names.get(name, name): value for name, value in _preset_options(config.preset).items()}
    defaults |= {old: default for old, (_, default) in FORMER_NAMES.items()} | PRESETS_CHANGED
    router = router_options(ROUTERS[config.router]) if config.router in ROUTERS else {}
    floats = {f"router_options.{name}" for name, option in router.items() if option.annotation is float}
    values = {name: getattr(config, name) for name in ("preset", "router", "steps", "seed")}
    for name, value in flatten(config.to_dict()):
        old = names.get(name, name)
        if name in floats and type(value) is int:
            value = float(value)  # 4 and 4.0 are the same option
        if old == "model.experts_backend":
            value = BACKENDS_0_1_0.get(value, value)
        if name == "model.router_std" and not (config.router in ROUTERS and ROUTERS[config.router].steered):
            continue  # only routers that lambda steers have it
        if changes_result(name) and value != defaults.get(old):
            values[old] = value
    if config.from_ is not None:  # the weights count, wherever they are
        values[FROM] = _weights_of(config.from_)
    return values


@functools.cache
def _weights_of(folder: str) -> dict[str, str]:
    from remoe.lab.training.origin import open_origin  # needs PyTorch

    return open_origin(folder, verified=False).hashes()


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
