"""Configuration of the ReMoE language model."""

from collections.abc import Mapping

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from remoe.errors import ConfigError
from remoe.experts import BACKENDS
from remoe.routing import ROUTERS, Router
from remoe.sparsity import RULES

NORMALIZATIONS = ("paper", "official")


@strict
class RemoeConfig(PreTrainedConfig):
    """A LLaMA-style transformer whose feed-forward layers are mixtures of experts.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            max_position_embeddings, initializer_range, rms_norm_eps, rope_parameters, tie_word_embeddings,
            attention_bias, attention_dropout, use_cache: as in transformers' LlamaConfig; RoPE base 1e6.
        intermediate_size: width of one expert before the split by granularity; 4 * hidden_size when None.
        num_experts: E.
        num_experts_per_tok: k, wanted active experts per token: mean for "relu" and its kin, exact for "topk".
        granularity: G; each layer has E G experts of width intermediate_size / G, of which k G are active.
        qk_norm: normalise queries and keys per head, as Qwen3 does.
        router: a name in `remoe.routing.ROUTERS`.
        router_options: further keyword arguments of the router's class.
        shared_expert_size: width of an expert that every token goes through, beside the routed ones; 0 for none.
        load_balance: for "relu": weight the penalty by each expert's load (Eq. 10, 11) instead of plain L1 (Eq. 9).
        max_experts_per_token: for "relu" and "relu_scaled": cap on the executed experts of a token; None for no cap.
        regularizer_normalization: "paper": the penalty is the mean over layers (the 1/L of Eq. 9 and 11).
            "official": the sum, as in the authors' code; lambda is then L times smaller at equal penalty.
            Routers whose coefficient is constant always sum, as the paper's TopK baseline does.
        router_aux_loss_coef: weight of the regulariser of routers that lambda does not steer: the Switch loss of
            "topk" and "sparsemixer".
        sparsity_rule, lambda_init, lambda_alpha, lambda_fast_start: see `SparsityController`.
        experts_backend: see `remoe.MoE`.

    Raises:
        ConfigError: for sizes that do not fit together or unknown names.
    """

    model_type = "remoe"
    # transformers' Trainer gathers every other output as a prediction.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "lm_loss", "task_loss", "reg_loss", "routings"]
    default_theta = 1_000_000.0

    vocab_size: int = 51_200
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.01
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    qk_norm: bool = False
    num_experts: int = 8
    num_experts_per_tok: int = 1
    granularity: int = 1
    router: str = "relu"
    router_options: dict | None = None
    shared_expert_size: int = 0
    load_balance: bool = True
    max_experts_per_token: int | None = None
    regularizer_normalization: str = "paper"
    router_aux_loss_coef: float = 0.01
    sparsity_rule: str = "sign"
    lambda_init: float = 1e-8
    lambda_alpha: float = 1.2
    lambda_fast_start: bool = False
    experts_backend: str = "auto"

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"the number of attention heads must divide the width: {self.num_attention_heads} heads, "
                    f"hidden_size = {self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check()
        if self.router == "lory":
            self.use_cache = False  # a segment is routed by the segment before it, of which a KV cache knows nothing
        self.base_model_tp_plan = self._tensor_parallel_plan()  # transformers leaves it out of config.json
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.head_dim % 2:
            raise ConfigError(f"rotary embeddings need an even head width, but head_dim = {self.head_dim}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"the number of key-value heads must divide the number of attention heads: "
                f"{self.num_key_value_heads} and {self.num_attention_heads}"
            )
        if self.hidden_act != "silu":
            raise ConfigError(f"experts are SwiGLU: hidden_act must be 'silu', not {self.hidden_act!r}")
        for name, value, choices in (
            ("router", self.router, ROUTERS),
            ("sparsity rule", self.sparsity_rule, RULES),
            ("regularizer_normalization", self.regularizer_normalization, NORMALIZATIONS),
            ("experts backend", self.experts_backend, ("auto", *BACKENDS)),
        ):
            if value not in choices:
                raise ConfigError(f"unknown {name} {value!r}; choose one of: {', '.join(choices)}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"k must be between 1 and the number of experts, but k = {self.num_experts_per_tok} "
                f"and E = {self.num_experts}"
            )
        if self.granularity < 1 or self.intermediate_size % self.granularity:
            raise ConfigError(
                f"granularity must divide the expert width {self.intermediate_size}, but is {self.granularity}"
            )
        if self.max_experts_per_token is not None and self.router not in ("relu", "relu_scaled"):
            raise ConfigError(f"max_experts_per_token has no effect with router {self.router} (only relu, relu_scaled)")
        if self.shared_expert_size < 0:
            raise ConfigError(f"shared_expert_size must not be negative, but is {self.shared_expert_size}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")

    @property
    def router_arguments(self) -> dict[str, object]:
        """Keyword arguments for the router's class."""
        return arguments_of_router(self.router, self.router_options, self.load_balance, self.max_experts_per_token)

    @property
    def router_class(self) -> type[Router]:
        """The class of the routers."""
        return ROUTERS[self.router]

    @property
    def experts_per_layer(self) -> int:
        """E G: experts of a layer, after the split by granularity."""
        return self.num_experts * self.granularity

    @property
    def active_per_token(self) -> int:
        """k G: target number of a token's active experts in a layer, after the split by granularity."""
        return self.num_experts_per_tok * self.granularity

    @property
    def steered(self) -> bool:
        """Whether lambda multiplies the regulariser."""
        return ROUTERS[self.router].steered

    @property
    def routes_pairs(self) -> bool:
        """Whether tokens go to some of several experts; else each goes through one network, merged in "lory"."""
        return self.router not in ("dense", "dense_wide", "lory")

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers shards the model over tensor parallel ranks, by the names of its styles.

        Experts are cut along F. Layers that do not route pairs keep their one network whole.
        """
        cut = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        if self.qk_norm:
            cut |= {"q_norm": "replicated_with_grad_allreduce", "k_norm": "replicated_with_grad_allreduce"}
        plan = {f"layers.*.self_attn.{name}": style for name, style in cut.items()}
        if self.routes_pairs:
            plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
            plan["layers.*.mlp.experts.down_proj"] = "rowwise"
            plan["layers.*.mlp.experts"] = "moe_tp_experts"
        return plan


# What any config of transformers takes besides its attributes.
_OF_TRANSFORMERS = ("attn_implementation", "experts_implementation", "torch_dtype")


def check_fields(options: Mapping[str, object]) -> None:
    """Raises ConfigError for an option that a RemoeConfig would take without knowing it: a slip of the pen."""
    known = {*RemoeConfig.__dataclass_fields__, *dir(PreTrainedConfig), *_OF_TRANSFORMERS}
    if unknown := options.keys() - known:
        raise ConfigError(f"RemoeConfig has no {', '.join(sorted(unknown))}")


def arguments_of_router(
    router: str, options: dict[str, object] | None, load_balance: bool, max_experts_per_token: int | None
) -> dict[str, object]:
    """Keyword arguments for the router's class: its options, and those of the model that go to it."""
    relu = {"load_balance": load_balance, "max_experts_per_token": max_experts_per_token}
    return (relu if router in ("relu", "relu_scaled") else {}) | (options or {})
