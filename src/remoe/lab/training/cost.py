"""What a run has cost: parameters, tokens, FLOPs of the pairs that were routed, and throughput.

Legend: S sequence length, D model width, V vocabulary.
"""

import statistics

from remoe.convert.relufy.model import RelufiedMixin
from remoe.lab.training.lora import is_adapter
from remoe.lab.training.metrics import iterate_metrics
from remoe.lab.training.trainer import Trainer
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.plan import training_flops

Model = RemoeForCausalLM | RelufiedMixin
_EXPERTS = ".experts."  # in the names of the weights of routed experts


def cost_of(trainer: Trainer, sparsity: float) -> dict[str, float]:
    """The entries of the summary about the cost of a run.

    Args:
        trainer: after its last step.
        sparsity: of the validation, for the parameters that a token meets.
    """
    config, shape, model = trainer.config, trainer.shape, trainer.model
    parameters = count_parameters(model)
    experts = count_parameters(model, _EXPERTS)
    step_tokens = config.batch_size * config.seq_len
    if isinstance(model, RelufiedMixin):
        fixed, routed = relufied_flops(model, config.seq_len)
        flops = step_tokens * sum(fixed + routed * (1 - s) for s in trainer.sparsities)
    else:
        flops = training_flops(shape, config.seq_len, step_tokens, trainer.sparsities)
    metrics = iterate_metrics(trainer.run.metrics) if trainer.step else ()
    speeds = [r["tokens_per_second"] for r in metrics if "tokens_per_second" in r]
    return {
        "total_parameters": parameters,
        "active_parameters": round(parameters - experts * (sparsity if shape.routes_pairs else 0)),
        "tokens": trainer.step * step_tokens,
        "flops": flops,
        "flops_per_token": flops / (trainer.step * step_tokens) if trainer.step else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def count_parameters(model: Model, part: str = "") -> int:
    """Weights of a model, without adapters, whose names have `part` in them."""
    named = model.named_parameters()
    return sum(weight.numel() for name, weight in named if part in name and not is_adapter(name))


def relufied_flops(model: RelufiedMixin, seq_len: int) -> tuple[float, float]:
    """Forward and backward FLOPs of a token, from the model's own matrices: some of its layers may be dense.

    Attention counts all S positions, and routers are counted, as in `training_flops`.

    Args:
        model: relufied, with or without adapters, which are not counted.
        seq_len: S.

    Returns:
        Those of all that every token goes through, and those of all routed experts, of which a token meets 1 - S.
    """
    text, head = model.config.get_text_config(), model.get_output_embeddings().weight
    vocabulary = {id(head), id(model.get_input_embeddings().weight)}  # (V, D); the same tensor where they are tied
    fixed, routed = head.numel(), 0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or id(weight) in vocabulary or is_adapter(name) or name.endswith("bias"):
            continue
        if _EXPERTS in name:
            routed += weight.numel()
        else:
            fixed += weight.numel()
    heads = text.num_attention_heads
    of_one = getattr(text, "head_dim", None) or text.hidden_size // heads
    key, value = getattr(text, "qk_head_dim", None) or of_one, getattr(text, "v_head_dim", None) or of_one
    products = text.num_hidden_layers * heads * (key + value) * seq_len
    return 6.0 * (fixed + products), 6.0 * routed  # a multiply and an add, forward once and backward twice
