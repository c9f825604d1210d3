"""The forward pass of one layer on a few tokens, as in generation, whose time is that of reading the weights.

Each implementation has several layers, more than the caches hold, which take turns: the weights come from memory, as in
a model with many layers.

Legend: T tokens, D model width, F expert width, E experts, k experts per token.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from remoe.lab.bench.dense import dense_layers
from remoe.lab.bench.layer import Case, Output, relu_layer, tokens
from remoe.lab.bench.peers import mixtral_layer
from remoe.lab.bench.roofline import Roofline
from remoe.lab.bench.timing import comparison, round_seconds
from remoe.layer import MoE

CASES = (Case(1, 768, 3072, 8, 1), Case(16, 768, 768, 32, 4))
RESIDENT_BYTES = 2**28  # of the active weights in all layers of one implementation


@torch.inference_mode()
def bench_decode(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    backends: tuple[str, ...],
    peers: bool,
    repetitions: int,
    roofline: Roofline,
    compiled: bool = False,
) -> dict[str, object]:
    """Times the forward pass of each implementation on a few tokens; arguments as for `bench_layer`.

    Returns:
        The case, and by implementation: milliseconds, their spread, their ratios to the dense layers and to the time of
        reading the active weights, and the mean number of experts with at least one token.
    """
    torch.manual_seed(0)
    expert_bytes = 3 * case.D * case.F * dtype.itemsize
    layers = max(2, -(-RESIDENT_BYTES // (expert_bytes * min(case.E, case.T * case.k))))
    with device:
        dense = dense_layers(case.D, case.k * case.F, dtype, compiled)
    factories: dict[str, Callable[[], nn.Module]] = dict(dense)
    for backend in backends:
        name = "remoe" if backend == "auto" else f"remoe {backend}"
        factories[f"{name} relu"] = lambda b=backend: Output(relu_layer(case, b, case.k / case.E))
        factories[f"{name} topk"] = lambda b=backend: Output(MoE(case.D, case.F, case.E, case.k, "topk", backend=b))
    if peers:
        for peer in ("eager", "grouped_mm", "batched_mm"):
            factories[f"transformers {peer}"] = lambda p=peer: mixtral_layer(case, p)
    with device:  # as in `remoe.lab.bench.layer`
        stacks = {name: [make().to(device, dtype).eval() for _ in range(layers)] for name, make in factories.items()}
    inputs = {name: [_input(layer, case, device, dtype) for layer in stack] for name, stack in stacks.items()}
    steps = {name: _step(stack, inputs[name]) for name, stack in stacks.items()}
    if device.type == "cuda":  # without the time of launches
        captured = [name for name in steps if name == "dense" or name.startswith("remoe")]
        steps |= {f"{name}, CUDA graph": _captured(steps[name]) for name in captured}
    rounds = round_seconds(steps, device, repetitions, ahead=False)
    times = comparison({name: [s / layers for s in seconds] for name, seconds in rounds.items()}, tuple(dense))
    active = {
        name: sum(_active_experts(layer, x) for layer, x in zip(stack, inputs[name], strict=True)) / layers
        for name, stack in stacks.items()
        if isinstance(stack[0], Output)
    }
    reading = {name: experts * expert_bytes / roofline.read_bytes for name, experts in active.items()}
    reading |= dict.fromkeys(dense, case.k * expert_bytes / roofline.read_bytes)
    return {
        **asdict(case),
        "layers": layers,
        "active_experts": active,
        **times,
        "ratio_to_reading_the_weights": {name: times["milliseconds"][name] / 1e3 / s for name, s in reading.items()},
    }


def _input(layer: nn.Module, case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T, D) tokens; for our layers drawn until they have exactly k T pairs."""
    while True:
        x_TD = tokens(case.T, case.D, device, dtype)
        if not isinstance(layer, Output) or layer(x_TD, routing=True).count_E.sum() == case.k * case.T:
            return x_TD


def _active_experts(layer: Output, x_TD: Tensor) -> int:
    return int((layer(x_TD, routing=True).count_E > 0).sum())


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _step(stack: list[nn.Module], inputs: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for layer, x_TD in zip(stack, inputs, strict=True):
            layer(x_TD)

    return step
