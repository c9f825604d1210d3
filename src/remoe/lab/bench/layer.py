"""The forward and backward pass of one layer with its router, against a dense layer of equal active size and others.

Legend: T tokens, D model width, F expert width, E experts, k target number of active experts per token.
"""

from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from remoe.lab.bench.dense import dense_layers
from remoe.lab.bench.peers import peer_layers
from remoe.lab.bench.roofline import Roofline
from remoe.lab.bench.timing import comparison, host_seconds, peak_bytes, round_seconds
from remoe.layer import MoE
from remoe.routing import Routing


@dataclass(frozen=True)
class Case:
    """The sizes of a layer and its input; see the legend."""

    T: int
    D: int
    F: int
    E: int
    k: int

    def __str__(self) -> str:
        return f"{self.T}, {self.D}, {self.F}, {self.E}, {self.k}"

    @property
    def flops(self) -> int:
        """FLOPs of the experts, forward and backward, at k experts per token."""
        return 18 * self.T * self.k * self.D * self.F

    def weight_traffic(self, dtype: torch.dtype) -> int:
        """Bytes of all experts' weights, read in the forward and the backward pass, and of their gradients, written."""
        return 3 * (3 * self.E * self.D * self.F) * dtype.itemsize


CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case(2048, 256, 1024, 8, 1),
        Case(2048, 256, 256, 32, 4),
        Case(2048, 256, 128, 64, 8),
        Case(4096, 512, 1024, 16, 2),
    ),
    "experts": tuple(Case(2048, 256, 256, E, 4) for E in (8, 16, 32, 64, 128, 256)),
    "cuda": (Case(16384, 2048, 5632, 8, 1), Case(16384, 2048, 1408, 32, 4), Case(16384, 2048, 704, 64, 8)),
}


class Output(nn.Module):
    """Our layer with only its first output, or with `routing=True` only its second."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, routing: bool = False) -> Tensor | Routing:
        return self.layer(x)[1 if routing else 0]


def tokens(T: int, D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T, D) normally distributed, with a constant first column that serves routers as a bias."""
    x_TD = torch.randn(T, D, device=device, dtype=dtype)
    x_TD[:, 0] = 1
    return x_TD


def relu_layer(case: Case, experts: str, density: float) -> MoE:
    """A ReLU-routed layer that activates, on average, a fraction `density` of its pairs on `tokens(...)`."""
    layer = MoE(case.D, case.F, case.E, case.k, "relu", backend=experts)
    with torch.no_grad():
        # A logit is the constant column's weight plus a normal variable: the density is a quantile of the latter.
        scale = layer.router.weight[:, 1:].norm(dim=1)
        layer.router.weight[:, 0] = -scale * (NormalDist().inv_cdf(1 - density) if density < 1 else -10)
    return layer


def bench_layer(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    backends: tuple[str, ...],
    peers: bool,
    repetitions: int,
    roofline: Roofline,
    compiled: bool = False,
    memory: bool = True,
) -> dict[str, object]:
    """Times each implementation, and measures its memory.

    Args:
        case: sizes.
        device: where the layers run.
        dtype: of weights and tokens.
        backends: backends of our layer to measure.
        peers: whether to measure the other implementations that are installed.
        repetitions: number of timed rounds.
        roofline: of the same device and dtype.
        compiled: whether one of the dense layers is compiled.
        memory: whether to measure memory, for which each implementation runs again, and ours with every expert active.

    Returns:
        The case, statistics of the pairs, and by implementation: milliseconds, their spread, ratios to the dense
        layers, fractions of the roofline, and megabytes; for those with E experts also the milliseconds that remain
        without the time of `Case.weight_traffic` at the rate of memory reads.
    """
    torch.manual_seed(0)
    with device:  # drawing so many weights on the host would take longer than all measurements
        dense = dense_layers(case.D, case.k * case.F, dtype, compiled)
        layers: dict[str, nn.Module] = {name: make() for name, make in dense.items()}
        for backend in backends:
            name = "remoe" if backend == "auto" else f"remoe {backend}"
            layers[f"{name} relu"] = Output(relu_layer(case, backend, case.k / case.E))
            layers[f"{name} topk"] = Output(MoE(case.D, case.F, case.E, case.k, "topk", backend=backend))
        layers["remoe dense"] = Output(MoE(case.D, case.F, case.E, case.k, "dense"))
    x, dy = (tokens(case.T, case.D, device, dtype) for _ in range(2))
    relu = next(layer for layer in layers.values() if isinstance(layer, Output)).to(device, dtype)
    with torch.no_grad():
        active_T = (relu(x, routing=True).gate_TE > 0).sum(dim=1)
    if peers:
        with device:
            layers |= peer_layers(case, device, relu.layer.router, int(active_T.max()))
    steps = {name: Step(layer.to(device, dtype), x, dy) for name, layer in layers.items()}
    times = comparison(round_seconds(steps, device, repetitions), tuple(dense))
    host = host_seconds(steps, repetitions) if device.type == "cuda" else {}
    peak = {name: peak_bytes(step, device) for name, step in steps.items()} if memory else {}
    return {
        **asdict(case),
        "active_pairs_per_token": active_T.sum().item() / case.T,
        "most_pairs_of_a_token": int(active_T.max()),
        **times,
        "milliseconds_beyond_weights": {
            name: ms - 1e3 * case.weight_traffic(dtype) / roofline.read_bytes
            for name, ms in times["milliseconds"].items()
            if "dense" not in name
        },
        "share_of_gemm_rate": {
            name: case.flops / (ms / 1e3) / roofline.gemm_flops for name, ms in times["milliseconds"].items()
        },
        "host_milliseconds": {name: 1e3 * s for name, s in host.items()},
        "peak_megabytes": {name: p / 1e6 for name, p in peak.items()},
        "activation_megabytes": {name: (p - steps[name].gradient_bytes) / 1e6 for name, p in peak.items()},
        "dense_stage_peak_megabytes": _dense_stage_peaks(case, device, dtype, backends, x, dy) if memory else {},
    }


def ratio_beyond_weights(row: dict, first: dict) -> dict[str, float]:
    """By implementation, the milliseconds beyond the weights' of one row of `bench_layer` over those of another."""
    name = "milliseconds_beyond_weights"
    return {key: ms / first[name][key] for key, ms in row[name].items()}


def _dense_stage_peaks(case, device, dtype, backends, x, dy) -> dict[str, float]:
    """Peak megabytes of our layer with every expert active, including the gradients of the weights."""
    peaks = {}
    for backend in backends:
        with device:
            layer = Output(relu_layer(case, backend, density=1))
        step = Step(layer.to(device, dtype), x, dy)
        step()
        peaks["remoe relu" if backend == "auto" else f"remoe {backend} relu"] = peak_bytes(step, device) / 1e6
    return peaks


class Step:
    """A forward and a backward pass that writes new gradients of x and of all weights."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x.clone().requires_grad_(), dy

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.layer.parameters())

    def clear(self) -> None:
        """Frees the gradients."""
        for leaf in (self.x, *self.layer.parameters()):
            leaf.grad = None

    def __call__(self) -> None:
        self.clear()
        self.layer(self.x).backward(self.dy)
