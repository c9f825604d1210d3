"""Options of `remoe train` as version 0.1.0 called them."""

from typing import Any

# Options of the model in 0.1.0 that have another name or place today, with their defaults.
RENAMED = {"experts_backend": "auto", "load_balance": True, "max_experts_per_token": None}


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Nested options with those of version 0.1.0 under today's names.

    `model.experts_backend` became `model.backend`; `model.load_balance` and `model.max_experts_per_token` became
    options of the router. An old name with its default value is dropped, so `values` must be complete: merge a base
    with what is laid over it first. An option under its new name takes precedence. Backend "loop" became "cpu".
    """
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    if model.get("backend") == "loop":
        model = {**model, "backend": "cpu"}
        values = {**values, "model": model}
    if not model.keys() & RENAMED.keys():
        return values
    old = {name: value for name, value in model.items() if value != RENAMED.get(name, value)}
    model = {name: value for name, value in model.items() if name not in RENAMED}
    if "experts_backend" in old:
        backend = old.pop("experts_backend")
        model.setdefault("backend", "cpu" if backend == "loop" else backend)
    if "load_balance" in old and not _has_option(str(values.get("router", "relu")), "load_balance"):
        del old["load_balance"]  # 0.1.0 ignored it for such routers
    given = values.get("router_options") or {}
    if not old or not isinstance(given, dict):
        return {**values, "model": model}
    return {**values, "model": model, "router_options": {**old, **given}}


def _has_option(router: str, option: str) -> bool:
    from remoe.routing import ROUTERS, router_options  # needs torch

    return router in ROUTERS and option in router_options(ROUTERS[router])
