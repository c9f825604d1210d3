"""Routers: tokens to experts. One file each; `build_router` is how the rest of the package makes one."""

from torch import nn

from remoe.errors import ConfigError
from remoe.routing.assignment import Assignment, Routing
from remoe.routing.dense import DenseRouter
from remoe.routing.relu import ReLURouter
from remoe.routing.topk import TopKRouter

ROUTERS = {"relu": ReLURouter, "topk": TopKRouter, "dense": DenseRouter}

__all__ = ["ROUTERS", "Assignment", "DenseRouter", "ReLURouter", "Routing", "TopKRouter", "build_router"]


def build_router(name: str, d_model: int, num_experts: int, k: int, **options: object) -> nn.Module:
    """A router by name; `options` are those of its class.

    Raises:
        ConfigError: for a name that is not in ROUTERS, an option the router does not have, or a bad value.
    """
    if name not in ROUTERS:
        raise ConfigError(f"unknown router {name!r}; choose one of: {', '.join(ROUTERS)}")
    try:
        if name == "dense":
            return DenseRouter(**options)
        return ROUTERS[name](d_model, num_experts, k, **options)
    except TypeError as error:
        raise ConfigError(f"router {name!r}: {error}") from error
