"""Calls of the Python API made at random, with a fixed seed: each gives finite numbers or an error of one line."""

import inspect
import math
import random

import pytest
import torch

import remoe
from remoe.errors import RemoeError

SEED, PER_CALL = 0, 40
VALUES = [
    None, True, -1, 0, 1, 3, 1.5, 1e-3, math.nan, math.inf, -math.inf, "", "relu", "1", "ü", [], {}, {"x": 1}, (1,),
]  # fmt: skip


def layer(**options):
    moe = remoe.MoE(**{"d_model": 16, "d_ffn": 32, "num_experts": 4, "k": 1} | options)
    return moe(torch.randn(5, moe.d_model))[0]


def controller(**options):
    control = remoe.SparsityController(1, 4, **{"k": 1} | options)
    _, routing = remoe.MoE(16, 32, 4, 1)(torch.randn(5, 16))
    terms = control.loss_terms([routing])
    control.observe([routing])
    control.update()
    return torch.stack((terms.total.detach(), control.lam, control.sparsity))


def model(**options):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = remoe.RemoeConfig(**sizes | options)
    ids = torch.randint(config.vocab_size, (2, 5))
    return remoe.RemoeForCausalLM(config)(ids, labels=ids).loss


CALLS = {
    layer: (remoe.MoE, set()),
    controller: (remoe.SparsityController, {"num_layers", "num_experts", "layers"}),
    model: (remoe.RemoeConfig, {"kwargs", "transformers_version", "architectures"}),
}


def fault(call, options):
    """What is wrong with the result of a call; empty if it is finite, or an error that names the mistake in a line."""
    try:
        result = call(**options)
    except RemoeError as error:
        return repr(error) if "\n" in str(error) else ""
    except Exception as error:
        return repr(error)
    return "" if result.isfinite().all() else f"gives {result}"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_every_call_gives_finite_numbers_or_an_error_of_one_line(call):
    choose, faults = random.Random(f"{call.__name__} {SEED}"), {}
    of, left_out = CALLS[call]
    names = [name for name in inspect.signature(of).parameters if name not in left_out]
    for _ in range(PER_CALL):
        options = {choose.choice(names): choose.choice(VALUES) for _ in range(choose.choice((1, 1, 2)))}
        if found := fault(call, options):
            faults[str(options)] = found[:400]
    assert not faults, "\n".join(f"{options}\n    {found}" for options, found in faults.items())
