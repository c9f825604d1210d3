"""Options that hold any number of names and values, as one flag: `--flag a 1 b 2`. No torch import."""

import contextlib
from collections.abc import Callable
from typing import Annotated

import tyro

# The words that YAML reads as these values.
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None}
OptionValue = bool | int | float | str | None


def _alternating(metavar: str, value: Callable[[str], OptionValue]) -> tyro.constructors.PrimitiveConstructorSpec:
    """One flag with any number of words; without this, tyro would give every key of the default a flag of its own."""

    def pairs(words: list[str]) -> dict[str, OptionValue]:
        if len(words) % 2:
            raise ValueError("names and values must alternate")
        return {name: value(word) for name, word in zip(words[::2], words[1::2], strict=True)}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=pairs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    )


def _value(word: str) -> OptionValue:
    """As YAML would read it: `6` is a number, `true` a truth value."""
    if word.lower() in FLAGS:
        return FLAGS[word.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


NamedValues = Annotated[dict[str, OptionValue], _alternating("NAME VALUE ...", _value)]
NamedWeights = Annotated[dict[str, float], _alternating("NAME WEIGHT ...", float)]
