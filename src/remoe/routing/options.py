"""The options of a router: the arguments of its constructor besides D, E and k."""

import inspect
import math
import types
from typing import Union, get_args, get_origin

from remoe.errors import ConfigError
from remoe.routing.base import Router

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", types.NoneType: "nothing"}
SHAPE = ("self", "d_model", "num_experts", "k")


def router_options(router: type[Router]) -> dict[str, inspect.Parameter]:
    """Options by name; with those of its base where a constructor hands on what it does not know (`**options`)."""
    found: dict[str, inspect.Parameter] = {}
    for cls in router.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"], eval_str=True).parameters.values()
        for parameter in parameters:
            if parameter.default is not parameter.empty and parameter.name not in SHAPE:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def check_options(name: str, router: type[Router], options: dict[str, object]) -> None:
    """Checks names and types of options; what values they may have only the class knows.

    Raises:
        ConfigError: naming the router, the option, and what it may be.
    """
    known = router_options(router)
    for option, value in options.items():
        if option not in known:
            names = f"it has: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"router {name!r} has no option {option!r}; {names}")
        annotation = known[option].annotation
        allowed = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        if not WORDS.keys() >= set(allowed):  # the class of a user, with types of its own
            continue
        fits = type(value) in allowed or (float in allowed and type(value) is int)
        if not fits:
            words = " or ".join(WORDS[kind] for kind in allowed if kind is not types.NoneType)
            raise ConfigError(f"router {name!r}: option {option} must be {words}, but is {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"router {name!r}: option {option} must be finite, but is {value}")
