"""Routers: tokens to experts. One file each; `build_router` is how the rest of the package makes one."""

from remoe.errors import ConfigError
from remoe.routing.assignment import Assignment, Routing
from remoe.routing.base import Router
from remoe.routing.dense import DenseRouter, DenseWideRouter
from remoe.routing.expert_choice import ExpertChoiceRouter
from remoe.routing.hash import HashRouter
from remoe.routing.lory import LoryRouter, MergedRouting
from remoe.routing.options import check_options, router_options
from remoe.routing.relu import ReLURouter
from remoe.routing.relu_norm import ReLUNormRouter
from remoe.routing.relu_scaled import ReLUScaledRouter
from remoe.routing.sigmoid import SigmoidRouter
from remoe.routing.sparsemixer import SparseMixerRouter
from remoe.routing.threshold import ThresholdRouter
from remoe.routing.topk import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "relu": ReLURouter,
    "relu_norm": ReLUNormRouter,
    "relu_scaled": ReLUScaledRouter,
    "topk": TopKRouter,
    "sigmoid": SigmoidRouter,
    "sparsemixer": SparseMixerRouter,
    "expert_choice": ExpertChoiceRouter,
    "threshold": ThresholdRouter,
    "hash": HashRouter,
    "lory": LoryRouter,
    "dense": DenseRouter,
    "dense_wide": DenseWideRouter,
}

__all__ = [
    "ROUTERS",
    "Assignment",
    "MergedRouting",
    "ReLURouter",
    "Router",
    "Routing",
    "TopKRouter",
    "build_router",
    "router_options",
]


def build_router(name: str, d_model: int, num_experts: int, k: int, /, **options: object) -> Router:
    """A router by name; `options` are those of its class.

    Raises:
        ConfigError: for a name that is not in ROUTERS, an option the router does not have, or a bad value.
    """
    router = router_class(name)
    check_options(name, router, options)
    return router(d_model, num_experts, k, **options)


def router_class(name: str) -> type[Router]:
    """The class of a router.

    Raises:
        ConfigError: for a name that is not in ROUTERS.
    """
    if not isinstance(name, str) or name not in ROUTERS:
        known = ", ".join(ROUTERS)
        raise ConfigError(f"unknown router {name!r}; choose one of: {known} (files of own ones: REMOE_ROUTERS)")
    return ROUTERS[name]
