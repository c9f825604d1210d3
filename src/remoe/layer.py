"""The mixture-of-experts layer: router + experts.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor, nn

from remoe.decoding import decode, limits
from remoe.errors import ConfigError, check, check_integers, check_numbers, check_shapes
from remoe.experts import Experts, MergedExperts
from remoe.routing import Routing, build_router
from remoe.routing.base import split_by_granularity


class MoE(nn.Module):
    """A drop-in replacement for a transformer's feed-forward layer: `y, routing = layer(x)`.

    For training, pair it with a `SparsityController`, whichever router you use.

    Args:
        d_model: D, width of the tokens.
        d_ffn: width of one expert before the split by granularity.
        num_experts: E; router="dense" has one network of width k * d_ffn, the same active compute, and
            router="dense_wide" one of width E * d_ffn, the same parameters.
        k: target experts per token: a mean or exact, depending on the router.
        router: a name in `remoe.routing.ROUTERS`.
        granularity: G, a divisor of d_ffn. It splits every expert into G (arXiv 2412.14711, Eq. 12 and 13).
        backend: how experts are run: "auto" or one of `remoe.experts.BACKENDS`; see `Experts`.
        shared_expert_size: width of an expert that every token goes through, beside the routed ones; 0 for none.
        init_std: standard deviation of the normal initialisation of every weight.
        router_options: keyword arguments of the router's class, e.g. {"max_experts_per_token": 4}.

    Attributes:
        router: the `Router`; its `num_experts` and `k` are E G and k G.
        gate_threshold: at evaluation, pairs whose gate is at most this are not executed.
        max_experts: at evaluation, the largest number of experts executed per token; None for no limit.

    Raises:
        ConfigError: for sizes that are not whole numbers or do not fit together, and an unknown router or backend.
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
        backend: str = "auto",
        shared_expert_size: int = 0,
        init_std: float = 0.02,
        router_options: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        check_integers(1, d_model=d_model, d_ffn=d_ffn, num_experts=num_experts, k=k, granularity=granularity)
        check_integers(0, shared_expert_size=shared_expert_size)
        check(d_ffn % granularity == 0, f"granularity must divide d_ffn = {d_ffn}, but is {granularity}")
        check(k <= num_experts, f"k = {k} is more than the number of experts, {num_experts}")
        check_numbers(0, init_std=init_std)
        check(isinstance(router_options, dict | None), f"router_options must be a dict, but is {router_options!r}")
        E, F, K = split_by_granularity(num_experts, d_ffn, k, granularity)
        self.router = build_router(router, d_model, E, K, **(router_options or {}))
        experts = MergedExperts if self.router.merges else Experts
        networks, width = self.router.networks(E, F, K)
        self.experts = experts(networks, d_model, width, backend, K if self.router.routes_pairs else 1)
        self.shared_expert = Experts(1, d_model, shared_expert_size, backend, 1) if shared_expert_size else None
        self.d_model = d_model
        self.gate_threshold: float = 0.0
        self.max_experts: int | None = None
        self.reset_parameters(init_std)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draws every weight anew."""
        self.router.reset_parameters(std)
        self.experts.reset_parameters(std)
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters(std)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        token_ids: Tensor | None = None,
        documents: Tensor | None = None,
        gate_threshold: Tensor | None = None,
        max_experts: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Runs the layer.

        Args:
            x: (..., S, D) or (T, D), with any number of leading dimensions. S are the tokens of a sequence, for routers
                that look at neighbours.
            mask: (...) without D, false or 0 for padding: such tokens are in no pair and no statistic.
            token_ids: (...) int64 without D, for a router that needs them ("hash").
            documents: (...) int64 without D, which document each token of a sequence is in, where several are packed
                into one; for routers that look at neighbours.
            gate_threshold, max_experts: (...) floats and int64 without D, for each token its own value instead of the
                layer's attribute of that name. They too count at evaluation only.

        Returns:
            y: like x. Tokens without an expert get zero, or the output of a shared expert alone; NaN stays NaN.
                Rows of padding are undefined.
            routing: gates (`gate_TE`), counts per expert (`count_E`), `sparsity` and `regularizer` of these T tokens.

        Raises:
            ConfigError: for an x of another width than D, or another tensor whose shape is not x's without D.
        """
        if x.shape[-1] != self.d_model:
            raise ConfigError(f"x must be (..., {self.d_model}), but is {tuple(x.shape)}")
        given = {"token_ids": token_ids, "documents": documents}
        given |= {"gate_threshold": gate_threshold, "max_experts": max_experts}
        check_shapes(x.shape[:-1], mask=mask, **given)
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1).bool()
        ids_T = None if token_ids is None else token_ids.reshape(-1)
        seq_len = max(x.shape[-2], 1) if x.ndim > 1 else 1  # a divisor of no tokens too
        packed = {} if documents is None else {"document_T": documents.reshape(-1)}
        self.router.keep_float32()
        threshold = self.gate_threshold if gate_threshold is None else gate_threshold.reshape(-1)
        cap = self.max_experts if max_experts is None else max_experts.reshape(-1)
        y_TD, routing = decode(self, x_TD, mask_T, threshold, cap) or (None, None)
        if y_TD is None or routing is None:
            made = self.router(x_TD, mask_T, ids_T=ids_T, seq_len=seq_len, **packed)
            routing = self._limited(made, threshold, cap)
            if self.router.merges:
                y_TD = self.experts(x_TD, routing)
            elif not self.router.routes_pairs and mask is None:
                y_TD = self.experts(x_TD)
            else:
                y_TD = self.experts(x_TD, *self._slots(routing))
            if self.shared_expert is not None:
                y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view(x.shape), routing

    def _limited(self, routing: Routing, threshold: float | Tensor, cap: int | Tensor | None) -> Routing:
        return routing if self.training or not limits(threshold, cap) else routing.pruned(threshold, cap)

    def _slots(self, routing: Routing) -> tuple:
        return routing.assignment, routing.assignment.gate_N
