"""Configuration of the ReMoE language model."""

import math
from collections.abc import Callable, Mapping
from typing import Self

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from remoe.errors import ConfigError, check_choice
from remoe.experts import check_backend
from remoe.routing import ROUTERS, Router, router_options
from remoe.sparsity import NORMALIZATIONS, RULES

SPARSITY = {"rule": "sign", "lambda_init": 1e-8, "alpha": 1.2, "fast_start": False}
# What registers our models with transformers' Auto classes; nothing in an export's copy, which has an `auto_map`.
BEFORE_A_CONFIG: list[Callable[[], None]] = []
# Names of version 0.1.0, which config.json of its checkpoints and exports has.
_OLD_SPARSITY = {
    "sparsity_rule": "rule",
    "lambda_init": "lambda_init",
    "lambda_alpha": "alpha",
    "lambda_fast_start": "fast_start",
}
_OLD_ROUTER_OPTIONS = {"load_balance": True, "max_experts_per_token": None}  # with their defaults
_OLD = {"experts_backend", *_OLD_SPARSITY, *_OLD_ROUTER_OPTIONS}


@strict
class RemoeConfig(PreTrainedConfig):
    """A LLaMA-style transformer whose feed-forward layers are mixtures of experts.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            max_position_embeddings, initializer_range, rms_norm_eps, rope_parameters, tie_word_embeddings,
            attention_bias, attention_dropout, use_cache: as in transformers' LlamaConfig; RoPE base 1e6.
        router_std: standard deviation of the initial weights of routers that lambda steers ("relu" and its kin); None:
            `initializer_range`, as for all other weights.
        tokenizer_size: tokens of the tokenizer, where `vocab_size` is rounded up. Ids from there on are never sampled
            and have no part in a loss. None: every id is a token.
        intermediate_size: d_ffn, width of one expert before the split by granularity; 4 * hidden_size when None.
        num_experts: E.
        num_experts_per_tok: k, the target number of experts per token: a mean for "relu" and its kin, exact for "topk".
            `config.k` and `config.d_ffn` are the same numbers; config.json has transformers' names.
        granularity: G; each layer has E G experts of width d_ffn / G, of which k G are active.
        qk_norm: normalise queries and keys per head, as Qwen3 does.
        router: a name in `remoe.routing.ROUTERS`.
        router_options: further keyword arguments of the router's class.
        shared_expert_size: width of an expert that every token goes through, beside the routed ones; 0 for none.
        max_experts: the most experts of a token, those with the largest gates; the layers then call their experts as
            transformers' mixtures do (`remoe.models.capped`). None for no cap.
        expert_bits: 4 for experts whose weights are stored in 4 bits (`remoe.experts.packed`), which take no gradients;
            None for the dtype of the other weights.
        sparsity: `rule`, `lambda_init`, `alpha` and `fast_start` of `SparsityController`, or some of them.
        regularizer_normalization, router_aux_loss_coef: see `SparsityController`.
        backend: see `remoe.MoE`.

    Names of version 0.1.0 (`experts_backend`, `sparsity_rule`, `lambda_init`, `lambda_alpha`, `lambda_fast_start`,
    `load_balance`, `max_experts_per_token`) are taken too, and become today's.

    Raises:
        ConfigError: for sizes that do not fit together or unknown names.
    """

    model_type = "remoe"
    attribute_map = {"k": "num_experts_per_tok", "d_ffn": "intermediate_size"}
    # transformers' Trainer gathers every other output as a prediction.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "lm_loss", "task_loss", "reg_loss", "routings"]
    default_theta = 1_000_000.0

    vocab_size: int = 51_200
    tokenizer_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.01
    router_std: float | None = None
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
    max_experts: int | None = None
    expert_bits: int | None = None
    sparsity: dict | None = None
    regularizer_normalization: str = "paper"
    router_aux_loss_coef: float = 0.01
    backend: str = "auto"

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        for call in BEFORE_A_CONFIG:
            call()
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        take_todays_names(kwargs, self.router)
        self.backend = kwargs.pop("backend", self.backend)
        self.sparsity = SPARSITY | kwargs.pop("sparsity", {}) | (self.sparsity or {})
        self.router_options = kwargs.pop("router_options", {}) | (self.router_options or {}) or None
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
        if not self.router_class.supports_cache:
            self.use_cache = False
        self.base_model_tp_plan = self._tensor_parallel_plan()  # transformers leaves it out of config.json
        self.auto_map = kwargs.pop("auto_map", None) or {}  # TRL looks for it in every config of another package
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        # TRL gives it to every config with a `router_aux_loss_coef`, and takes a config that has it for one of a model
        # that returns `router_logits`. Ours returns routings, always.
        if name != "output_router_logits":
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, object]:
        """As transformers' method, without an empty `auto_map`."""
        values = super().to_dict()
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **kwargs: object) -> "RemoeConfig":
        """As transformers' method, but overrides of nested options are merged with the file's, and all are checked."""
        values, names = dict(config_dict), {*_OLD, *cls.attribute_map, "sparsity", "router_options", "backend"}
        for options in (values, given := {name: kwargs.pop(name) for name in names & kwargs.keys()}):
            take_todays_names(options, str(kwargs.get("router", values.get("router", "relu"))))
        for name, value in given.items():
            values[name] = (values.get(name) or {}) | value if isinstance(value, dict) else value
        if (values.get("tokenizer_size") or 0) > kwargs.get("vocab_size", math.inf):
            values["tokenizer_size"] = None  # of another vocabulary, whose rows are drawn anew
        return super().from_dict(values, **kwargs)

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
        check_choice("router", self.router, ROUTERS)
        check_choice("regularizer_normalization", self.regularizer_normalization, NORMALIZATIONS)
        self.backend = check_backend(self.backend)
        for name, value in self.sparsity.items():
            check_choice("option of sparsity", name, SPARSITY)
            default = SPARSITY[name]
            if type(value) is not type(default) and not (type(default) is float and type(value) is int):
                raise ConfigError(f"sparsity: {name} must be like {default!r}, but is {value!r}")
        check_choice("sparsity rule", self.sparsity["rule"], RULES)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"k must be between 1 and the number of experts, but k = {self.num_experts_per_tok} "
                f"and E = {self.num_experts}"
            )
        if self.granularity < 1 or self.intermediate_size % self.granularity:
            raise ConfigError(
                f"granularity must divide the expert width {self.intermediate_size}, but is {self.granularity}"
            )
        if self.max_experts is not None:
            if self.max_experts < 1:
                raise ConfigError(f"max_experts must be at least 1, but is {self.max_experts}")
            if not self.routes_pairs:
                raise ConfigError(f"router {self.router!r} routes no pairs: max_experts cannot limit them")
        if self.expert_bits is not None:
            self._check_bits()
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ConfigError(f"rms_norm_eps must be finite and not negative, but is {self.rms_norm_eps}")
        if self.router_std is not None and not 0 < self.router_std < math.inf:
            raise ConfigError(f"router_std must be finite and above 0, but is {self.router_std}")
        if self.shared_expert_size < 0:
            raise ConfigError(f"shared_expert_size must not be negative, but is {self.shared_expert_size}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")
        experts = self.num_hidden_layers * self.num_experts * self.intermediate_size
        if self.hidden_size * max(self.vocab_size, experts, self.hidden_size) >= 2**60:  # torch counts in 64 bits
            raise ConfigError("these sizes give a weight with more numbers than any machine can hold")
        if self.tokenizer_size is not None and not 1 <= self.tokenizer_size <= self.vocab_size:
            raise ConfigError(
                f"tokenizer_size must be between 1 and vocab_size = {self.vocab_size}, but is {self.tokenizer_size}"
            )

    def check_gates(self) -> None:
        """Raises ConfigError for a router without gates that a gate threshold or a cap could leave out."""
        if not self.routes_pairs:
            raise ConfigError(f"router {self.router!r} routes no pairs: there are no gates to leave out")

    def _check_bits(self) -> None:
        if self.expert_bits != 4:
            raise ConfigError(f"expert_bits must be 4 or None, but is {self.expert_bits!r}")
        if self.router_class.merges:
            raise ConfigError(f"router {self.router!r} merges its experts' weights, which must not be quantised")

    @property
    def router_class(self) -> type[Router]:
        """The router's class, whose attributes say what it needs and can do."""
        return ROUTERS[self.router]

    @property
    def steered(self) -> bool:
        """Whether lambda multiplies the regulariser."""
        return self.router_class.steered

    @property
    def routes_pairs(self) -> bool:
        """Whether tokens go to some of several experts; otherwise all go through one network."""
        return self.router_class.routes_pairs

    @property
    def experts_per_layer(self) -> int:
        """E G."""
        return self.num_experts * self.granularity

    @property
    def active_per_token(self) -> int:
        """k G, the target number of experts per token after the split by granularity."""
        return self.num_experts_per_tok * self.granularity

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers shards the model over tensor parallel ranks, by the names of its styles.

        Experts are cut along F. Layers that do not route pairs keep their one network whole, and so do packed experts.
        """
        cut = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        if self.qk_norm:
            cut |= {"q_norm": "replicated_with_grad_allreduce", "k_norm": "replicated_with_grad_allreduce"}
        plan = {f"layers.*.self_attn.{name}": style for name, style in cut.items()}
        if self.routes_pairs and self.expert_bits is None:  # a group of packed weights cannot be cut
            plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
            plan["layers.*.mlp.experts.down_proj"] = "rowwise"
            plan["layers.*.mlp.experts"] = "moe_tp_experts"
        return plan


def take_todays_names(options: dict[str, object], router: str) -> None:
    """Replaces names of version 0.1.0 by today's, in place; a name of today takes precedence."""
    old = {name: options.pop(name) for name in _OLD & options.keys()}
    if "load_balance" in old and "load_balance" not in router_options(ROUTERS.get(router, Router)):
        del old["load_balance"]  # 0.1.0 took no notice of it with such routers
    if "experts_backend" in old:
        options.setdefault("backend", old["experts_backend"])
    moved = {"sparsity": {new: old[name] for name, new in _OLD_SPARSITY.items() if name in old}}
    changed = {name: old[name] for name, default in _OLD_ROUTER_OPTIONS.items() if old.get(name, default) != default}
    for name, values in (moved | {"router_options": changed}).items():
        if values:
            options[name] = values | (options.get(name) or {})


# What any config of transformers takes besides its attributes.
_OF_TRANSFORMERS = ("attn_implementation", "experts_implementation", "torch_dtype")


def check_fields(options: Mapping[str, object]) -> None:
    """Raises ConfigError for an option that a RemoeConfig would take without knowing it: a slip of the pen."""
    known = {*RemoeConfig.__dataclass_fields__, *RemoeConfig.attribute_map, *_OLD}
    known |= {*dir(PreTrainedConfig), *_OF_TRANSFORMERS}
    if unknown := options.keys() - known:
        raise ConfigError(f"RemoeConfig has no {', '.join(sorted(unknown))}")
