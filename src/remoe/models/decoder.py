"""One layer of the ReMoE language model: attention and mixture of experts.

Legend: B batch, S sequence, D model width, H attention heads.
"""

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from remoe.experts.packed import check_packable
from remoe.layer import MoE
from remoe.models.attention import build_attention
from remoe.models.capped import build_mixture
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.norm import RMSNorm, residual_norm
from remoe.routing import Routing


def pack_experts(layer: MoE) -> None:
    """Stores the weights of a layer's experts, the shared one among them, in 4 bits.

    Raises:
        ConfigError: for widths that 32 does not divide.
    """
    parts = [experts for experts in (layer.experts, layer.shared_expert) if experts is not None]
    for experts in parts:  # before any is changed
        check_packable(*experts.down_proj.shape[1:])
    for experts in parts:
        experts.pack()


class RemoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and mixture of experts, each behind a norm and beside a residual connection."""

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        self.mlp = build_mixture(
            config.max_experts,
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.k,
            config.router,
            config.granularity,
            backend=config.backend,
            init_std=config.initializer_range,
            shared_expert_size=config.shared_expert_size,
            router_options=config.router_options,
        )
        if config.expert_bits is not None:
            pack_experts(self.mlp)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        token_mask_BS: Tensor | None = None,
        ids_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        dial: dict[str, Tensor] | None = None,
        **attention,
    ) -> tuple[Tensor, Routing, Tensor | None]:
        # The routing is an output, not a side effect: recomputing the layer in the backward pass cannot count twice.
        hidden_BSD, normed_BSD = residual_norm(self.input_layernorm, hidden_BSD)
        attended_BSD, weights_BHSS = self.self_attn(normed_BSD, **attention)
        hidden_BSD, normed_BSD = residual_norm(self.post_attention_layernorm, hidden_BSD, attended_BSD)
        given = {} if document_BS is None else {"documents": document_BS}
        expert_BSD, routing = self.mlp(normed_BSD, token_mask_BS, token_ids=ids_BS, **given, **(dial or {}))
        return hidden_BSD + expert_BSD, routing, weights_BHSS
