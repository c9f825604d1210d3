"""`upcycle`: turns a dense LLaMA-like model into a ReMoE model that computes the same function.

The dense layer stays as a shared expert that every token goes through. The routed experts are copies of it (or of its
slices) with a down projection of zero, and add to it as they learn. Their gates start at the target sparsity, measured
on sample text if some is given.

Without `keep_dense` every expert is a copy, and its gate starts at 1/E for every token, so that the gated sum over the
E copies is the dense layer. What makes the copies differ cancels in that sum. With copies c = 1 .. E,
slices d of the dense down projection, zero-sum orthonormal vectors a_i and b_j over the copies, all orthogonal,

    gate_c = 1/E + sum_i a_ic (w_i x)        down_c = d + sum_j b_jc P_j
    sum_c gate_c down_c = d + 1/E sum_jc b_jc P_j + sum_ic a_ic (w_i x) d + sum_ijc a_ic b_jc (w_i x) P_j = d

and w is so small that no gate reaches zero, whatever x (Cauchy-Schwarz on the normalised x).

Legend: D model width, F expert width, E copies, G slices of each.
"""

import math
from collections.abc import Iterable
from copy import deepcopy
from statistics import NormalDist

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe.convert.relufy.fit import Batch, as_batch
from remoe.errors import ConfigError
from remoe.models.configuration_remoe import RemoeConfig, check_fields, take_todays_names
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# No gate starts below this part of 1/E.
LOWEST_GATE = 0.5


@torch.no_grad()
def upcycle(
    dense: PreTrainedModel,
    num_experts: int,
    k: int = 1,
    granularity: int = 1,
    *,
    samples: Iterable[Batch] = (),
    diversity: float = 0.1,
    noise: float = 0.0,
    keep_dense: bool = True,
    seed: int = 0,
    **options: object,
) -> RemoeForCausalLM:
    """A ReMoE model from a dense one, with the same logits before the first step, for every E and G.

        dense = AutoModelForCausalLM.from_pretrained(folder)
        model = remoe.upcycle(dense, num_experts=4, k=1, samples=batches)  # token ids, (B, S) each

    About k of E experts are active from the first step, beside the dense layer. Without `keep_dense` the model has the
    dense one's active size in the end. But all its experts are active at first, so that a step costs as much as a dense
    model with a feed-forward layer E times as wide, and the penalty has to close experts while they part: a fine-tuning
    of 300 steps failed at that (docs/guides/convert.md).

    Args:
        dense: a causal language model of transformers' type llama, mistral, qwen2 or qwen3. It is not changed.
        num_experts: E.
        k: experts per token that the sparsity controller steers to.
        granularity: G: each expert is cut into G of 1/G of the dense width; k G of E G are active in the end.
        samples: text of the kind that the model is for: token ids, (B, S) int64, or mappings with `input_ids` and
            `attention_mask`; a few thousand tokens, for k/E of which each expert is active at first. Without samples,
            gates start as for independent inputs, which those of a real model are not: SmolLM2 had S = 0.84 for 0.75.
            Without effect unless `keep_dense`.
        diversity: standard deviation of what makes the copies' down projections differ, relative to the projection's.
            It cancels in the sum of all copies. Without effect with `keep_dense`, nor with E = 2.
        noise: standard deviation of noise on the gate and up projections, relative to theirs. It does not cancel: the
            logits are then only near the dense model's. With `keep_dense` they stay equal.
        keep_dense: keep the dense layer as a shared expert, beside experts that start without a contribution;
            different tokens make them differ. Otherwise the experts are copies of it.
        seed: of both.
        options: further fields of `RemoeConfig`, e.g. sparsity={"rule": "sign"}; none that this function sets.

    Raises:
        ConfigError: for a model of another type, or with parts that a ReMoE model does not have; for E < 2, k > E or
            a granularity that does not divide the width.
    """
    config = _config(dense, num_experts, k, granularity, keep_dense, options)
    dtype = dense.lm_head.weight.dtype
    with torch.device(dense.device):
        model = RemoeForCausalLM(config).to(dtype)
    model.model.embed_tokens.load_state_dict(dense.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(dense.model.norm.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(dense.lm_head.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        _copy_attention(old.self_attn, new.self_attn)
        new.input_layernorm.load_state_dict(old.input_layernorm.state_dict())
        new.post_attention_layernorm.load_state_dict(old.post_attention_layernorm.state_dict())
        norm_D = old.post_attention_layernorm.weight
        if keep_dense:
            _fill_sparse_router(new.mlp.router, 1 - k / num_experts, norm_D, generator)
            _fill_shared_expert(new.mlp.shared_expert, old.mlp)
        else:
            a_CI, b_CJ = _orthogonal_directions(num_experts, generator)
            _fill_router(new.mlp.router, a_CI, granularity, norm_D, generator)
        _fill_gate_up(new.mlp.experts, old.mlp, num_experts, granularity, noise, generator)
        if keep_dense:
            new.mlp.experts.down_proj.zero_()
        else:
            _fill_down(new.mlp.experts, old.mlp, b_CJ, granularity, diversity, generator)
    if keep_dense and (batches := [as_batch(batch, model.device) for batch in samples]):
        _calibrate(model, batches, 1 - k / num_experts)
    if dense.generation_config is not None:
        model.generation_config = deepcopy(dense.generation_config)
    return model.train(dense.training)


def _config(
    dense: PreTrainedModel, E: int, k: int, G: int, keep_dense: bool, options: dict[str, object]
) -> RemoeConfig:
    old = dense.config
    name = type(dense).__name__
    if old.model_type not in MODEL_TYPES or not hasattr(dense, "lm_head"):
        raise ConfigError(
            f"upcycle takes causal language models of type {', '.join(MODEL_TYPES)}; {name} is {old.model_type!r}"
        )
    if E < 2:
        raise ConfigError(f"upcycle needs at least 2 experts, but E = {E}")
    mlp = dense.model.layers[0].mlp
    for part in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, part)
        weight = linear.weight
        if not weight.is_floating_point() or hasattr(weight, "quant_state") or hasattr(weight, "qdata"):
            raise ConfigError(f"model.layers.0.mlp.{part} is quantised; load the dense model without quantisation")
        if linear.bias is not None:
            raise ConfigError(f"model.layers.0.mlp.{part} has a bias, which the experts have not")
    context = old.max_position_embeddings
    if (window := getattr(old, "sliding_window", None)) and getattr(old, "use_sliding_window", True):
        context = min(context, window)  # within the window, attention is full attention
    attention = dense.model.layers[0].self_attn
    take_todays_names(options, "relu")
    fields = {
        "intermediate_size": old.intermediate_size,
        "head_dim": attention.head_dim,
        "max_position_embeddings": context,
        "attention_bias": any(getattr(attention, p).bias is not None for p in ("q_proj", "k_proj", "v_proj", "o_proj")),
        "qk_norm": hasattr(attention, "q_norm"),
        "rope_parameters": dict(old.rope_parameters),
        "num_experts": E,
        "num_experts_per_tok": k,
        "granularity": G,
        "shared_expert_size": old.intermediate_size if keep_dense else 0,
        "router_options": (options.get("router_options") or {}) | {"bias": True},
        "sparsity": {"rule": "smooth", "fast_start": True} | (options.get("sparsity") or {}),
    }
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("hidden_act", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id")
    same += ("tie_word_embeddings", "attention_dropout", "use_cache")
    given = {RemoeConfig.attribute_map.get(name, name) for name in options}
    if "bias" in (options.get("router_options") or {}):
        given.add("router")
    if taken := sorted(given & (fields.keys() - {"sparsity", "router_options"} | {"router"} | set(same))):
        raise ConfigError(f"upcycle itself sets {', '.join(taken)}")
    check_fields(options)
    return RemoeConfig(**{key: getattr(old, key) for key in same if hasattr(old, key)} | options | fields)


def _copy_attention(old: nn.Module, new: nn.Module) -> None:
    state = old.state_dict()
    for name, value in new.state_dict().items():
        state.setdefault(name, torch.zeros_like(value))  # a bias that only some projections of the dense model have
    new.load_state_dict(state)


def _orthogonal_directions(E: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(E, I) and (E, J): columns of one orthonormal basis of the zero-sum vectors; I = ceil((E - 1) / 2)."""
    basis = torch.randn(E, E, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis).Q[:, 1:]
    half = E // 2
    return basis[:, :half], basis[:, half:]


def _fill_router(router: nn.Module, a_CI: Tensor, G: int, norm_D: Tensor, generator: torch.Generator) -> None:
    """Gates 1/E + a w x, none of which falls below LOWEST_GATE / E for any x = norm * n with |n|^2 = D."""
    E, D = len(a_CI), len(norm_D)
    scale_D = norm_D.double().cpu()
    weight_CD = a_CI @ torch.randn(a_CI.shape[1], D, generator=generator, dtype=torch.float64)
    reach_C = math.sqrt(D) * (weight_CD * scale_D).norm(dim=1)  # the largest |w x|
    weight_CD *= (1 - LOWEST_GATE) / E / reach_C.max()
    router.weight.copy_(weight_CD.repeat_interleave(G, dim=0))
    router.bias.fill_(1 / E)


def _fill_sparse_router(router: nn.Module, sparsity: float, norm_D: Tensor, generator: torch.Generator) -> None:
    """Logits of unit variance for x = norm * n with independent n of unit variance, less their quantile."""
    weight_ED = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
    weight_ED /= (weight_ED * norm_D.double().cpu()).norm(dim=1, keepdim=True)
    router.weight.copy_(weight_ED)
    router.bias.fill_(-NormalDist().inv_cdf(max(sparsity, 1e-4)))


def _calibrate(model: RemoeForCausalLM, batches: list[dict[str, Tensor]], sparsity: float) -> None:
    """Logits of unit deviation on the batches, less the quantile that leaves each expert its share of the tokens."""
    routers = [layer.mlp.router for layer in model.model.layers]
    logits: list[list[Tensor]] = [[] for _ in routers]
    for router in routers:
        router.bias.zero_()
    with evaluating(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            kept = slice(None) if mask is None else mask.flatten().bool()
            for found, routing in zip(logits, model(**batch, use_cache=False).routings, strict=True):
                found.append(routing.logits_TE[kept].float())
    if sum(map(len, logits[0])) < 2:
        raise ConfigError("samples must have two tokens at least that are not padding")
    for router, found in zip(routers, logits, strict=True):
        logits_TE = torch.cat(found)
        deviation_E = logits_TE.std(dim=0).clamp(min=1e-6)
        sorted_TE = (logits_TE / deviation_E).sort(dim=0).values
        inactive = round(sparsity * len(sorted_TE))
        highest_E = sorted_TE[inactive - 1] if inactive else sorted_TE[0] - 1
        router.weight.copy_(router.weight / deviation_E[:, None].to(router.weight))
        router.bias.copy_(-highest_E)


def _fill_shared_expert(expert: nn.Module, mlp: nn.Module) -> None:
    expert.gate_up_proj[0] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    expert.down_proj[0] = mlp.down_proj.weight


def _fill_gate_up(experts: nn.Module, mlp: nn.Module, E: int, G: int, noise: float, generator: torch.Generator) -> None:
    """Every copy's slices of the gate and up projections, with noise of this part of their standard deviation."""
    gate_up_G2FD = torch.cat(
        [mlp.gate_proj.weight.unflatten(0, (G, -1)), mlp.up_proj.weight.unflatten(0, (G, -1))], dim=1
    )
    experts.gate_up_proj.copy_(gate_up_G2FD.repeat(E, 1, 1))
    if noise:
        spread = noise * gate_up_G2FD.float().std().item()
        drawn = torch.randn(experts.gate_up_proj.shape, generator=generator) * spread
        experts.gate_up_proj += drawn.to(experts.gate_up_proj)


def _fill_down(
    experts: nn.Module, mlp: nn.Module, b_CJ: Tensor, G: int, diversity: float, generator: torch.Generator
) -> None:
    """Every copy's slices of the down projection, plus differences of this part of its deviation that cancel."""
    E, J = b_CJ.shape
    down = experts.down_proj
    down_GDF = mlp.down_proj.weight.unflatten(1, (G, -1)).transpose(0, 1)
    # Scaled so that each copy differs from the mean by `diversity`, whatever the number of directions.
    scale = diversity * down_GDF.float().std().item() * math.sqrt(E / max(J, 1))
    direction_JGDF = torch.randn(J, *down_GDF.shape, generator=generator).to(down.device) * scale
    for copy in range(E):
        difference = torch.einsum("j,jgdf->gdf", b_CJ[copy].float().to(down.device), direction_JGDF)
        down[copy * G : (copy + 1) * G] = (down_GDF.float() + difference).to(down.dtype)
