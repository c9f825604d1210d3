"""Text from a trained model: `generate_text` for one prompt, `write_texts` for many.

Names load on first use, so that the options do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from remoe.lab.generation.options import LONGEST_TEXT, Sampling, SamplingOptions, check_prompt

if TYPE_CHECKING:
    from remoe.lab.generation.text import check_length, generate_ids, generate_text, write_texts

__all__ = [
    "LONGEST_TEXT",
    "Sampling",
    "SamplingOptions",
    "check_length",
    "check_prompt",
    "generate_ids",
    "generate_text",
    "write_texts",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.text"), name)
