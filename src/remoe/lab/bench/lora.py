"""The forward and backward pass of one layer with LoRA on its experts: on the pairs, by PEFT, and frozen without it.

Legend: T tokens, D model width, F expert width, E experts, k target number of active experts per token.
"""

import copy
from dataclasses import asdict

import torch
from torch import nn

from remoe.errors import missing_extra
from remoe.lab.bench.layer import Case, Output, Step, relu_layer, tokens
from remoe.lab.bench.timing import medians_and_spread, peak_bytes, round_seconds

CASES = tuple(Case(T, D, F, E, k) for T, D, F, k in ((2048, 256, 256, 4), (1024, 1024, 512, 4)) for E in (8, 32, 128))
FROZEN, PEFT, PAIRS = "frozen, no LoRA", "PEFT", "remoe, on the pairs"


def check_peft() -> None:
    """Raises ExtraError when PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(error, "lora", "remoe bench lora") from error


def bench_lora(case: Case, rank: int, device: torch.device, dtype: torch.dtype, repetitions: int) -> dict[str, object]:
    """Times both ways of LoRA and the frozen layer, which take turns, and measures their memory.

    Args:
        case: sizes.
        rank: of the adapters.
        device: where the layers run.
        dtype: of weights, adapters and tokens.
        repetitions: number of timed rounds.

    Returns:
        The case, the bytes of the adapters, and by implementation: median milliseconds, their spread, ratios to PEFT's,
        and the peak of memory, in MB.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from remoe.integrations.lora import lora_on_pairs

    torch.manual_seed(0)
    with device:
        frozen = Output(relu_layer(case, "auto", case.k / case.E)).to(device, dtype).requires_grad_(False)
    adapted = copy.deepcopy(frozen)
    targets = ["layer.experts.gate_up_proj", "layer.experts.down_proj"]
    config = LoraConfig(r=rank, target_modules=[], target_parameters=targets, init_lora_weights=False)
    inject_adapter_in_model(config, adapted)
    on_pairs = copy.deepcopy(adapted)
    lora_on_pairs(on_pairs)
    layers: dict[str, nn.Module] = {FROZEN: frozen, PEFT: adapted, PAIRS: on_pairs}
    x, dy = (tokens(case.T, case.D, device, dtype) for _ in range(2))
    steps = {name: Step(layer, x, dy) for name, layer in layers.items()}
    seconds = round_seconds(steps, device, repetitions)
    measured = medians_and_spread(seconds)
    milliseconds = measured["milliseconds"]
    peak = {name: peak_bytes(step, device) / 1e6 for name, step in steps.items()}
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return {
        **asdict(case),
        "rank": rank,
        "adapter_megabytes": sum(p.numel() * p.element_size() for p in adapters) / 1e6,
        **measured,
        "ratio_to_peft": {name: median / milliseconds[PEFT] for name, median in milliseconds.items()},
        "peak_megabytes": peak,
    }
