"""The mixture-of-experts layer: router + experts.

Legend: T tokens, D model width, E experts.
"""

from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.experts import Experts
from remoe.routing import DenseRouter, Routing, build_router


class MoE(nn.Module):
    """A drop-in replacement for a transformer's feed-forward layer: `y, routing = layer(x)`.

    Granularity G splits each expert into G of width d_ffn / G (arXiv 2412.14711, Eq. 12 and 13): the layer then has
    E G experts of which k G are active, and the compute stays the same.

    Args:
        d_model: D, width of the tokens.
        d_ffn: width of one expert before the split by granularity.
        num_experts: E; with router="dense" there is one expert of width k * d_ffn, the same active compute.
        k: wanted active experts per token (mean for "relu", exact for "topk").
        router: "relu", "topk" or "dense".
        granularity: G, a divisor of d_ffn.
        experts: backend of the experts: "auto" or one of `remoe.experts.BACKENDS`; see `Experts`.
        init_std: standard deviation of the normal initialisation of every weight.
        router_options: keyword arguments of the router's class, e.g. {"max_experts_per_token": 4}.

    Raises:
        ConfigError: for k > E, an unknown router or backend, a granularity that does not divide d_ffn.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        num_experts: int,
        k: int,
        router: str = "relu",
        granularity: int = 1,
        *,
        experts: str = "auto",
        init_std: float = 0.02,
        router_options: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"d_model": d_model, "d_ffn": d_ffn, "num_experts": num_experts, "k": k}.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, but is {value}")
        if granularity < 1 or d_ffn % granularity:
            raise ConfigError(f"granularity must divide d_ffn = {d_ffn}, but is {granularity}")
        if k > num_experts:
            raise ConfigError(f"k = {k} is more than the number of experts, {num_experts}")
        self.router = build_router(
            router, d_model, num_experts * granularity, k * granularity, **(router_options or {})
        )
        if router == "dense":
            self.experts = Experts(1, d_model, k * d_ffn, experts, 1)
        else:
            self.experts = Experts(num_experts * granularity, d_model, d_ffn // granularity, experts, k * granularity)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=init_std)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Runs the layer.

        Args:
            x: (..., D), any number of leading dimensions; T is their product.
            mask: (...) bool without D, false for padding: such tokens are in no pair and no statistic.

        Returns:
            y: like x; zero for tokens without an expert (they keep the residual connection only).
            routing: gates (`gate_TE`), counts per expert (`count_E`), `sparsity` and `regularizer` of these T tokens.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        routing = self.router(x_TD, mask_T)
        if isinstance(self.router, DenseRouter) and mask is None:
            y_TD = self.experts.run_first(x_TD)
        else:
            y_TD = self.experts(x_TD, routing.assignment)
        return y_TD.view(x.shape), routing
