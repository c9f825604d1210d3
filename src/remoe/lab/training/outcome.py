"""How a run went, in words: for the end of its output, its summary and its report.

Legend: L layers, E experts.
"""

from typing import Any

from remoe.lab.analysis.measures import inactive_experts
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.validate import Evaluation
from remoe.models.configuration_remoe import RemoeConfig
from remoe.stages import SETTLED_STEPS


def experts_in_use(model: RemoeConfig, result: Evaluation) -> dict[str, Any]:
    """The summary's figures about the load of the experts; none where tokens are not sent to single experts.

    Args:
        model: configuration of the model.
        result: evaluation of all validation tokens.

    Returns:
        `experts` (L E G), and `inactive_experts_per_layer`: how many have less than an eighth of the target load.
    """
    if not model.routes_pairs:
        return {}
    inactive_LE = inactive_experts(result.share_LE, model.active_per_token)
    return {"experts": inactive_LE.numel(), "inactive_experts_per_layer": inactive_LE.sum(dim=1).tolist()}


def outcome(config: TrainConfig, model: RemoeConfig, figures: dict[str, Any]) -> list[str]:
    """Sentences: whether the sparsity settled, how many experts are in use, and what to do about either.

    Args:
        config: options of the run.
        model: configuration of its model.
        figures: the summary of the run, with `experts_in_use`.
    """
    said, advice = [], []
    if model.steered and model.sparsity["rule"] != "none":
        said.append(_sparsity(figures))
        if figures["settling_step"] is None:
            advice.append(_longer(config, model))
    if "experts" in figures:
        unused = figures["inactive_experts_per_layer"]
        said += _experts(figures["experts"], unused)
        if 2 * sum(unused) > figures["experts"] and config.num_experts > 2 * config.k:
            advice.append(
                f"Fewer experts, such as --num-experts {config.num_experts // 2}, would cost a token the same."
            )
    return said + advice


def _sparsity(figures: dict[str, Any]) -> str:
    target = f"target {figures['target_sparsity']:.4g}"
    if figures["settling_step"] is not None:
        return (
            f"Sparsity settled at step {figures['settling_step']}: since then mean {figures['sparsity_mean']:.4f}, "
            f"deviation {figures['sparsity_deviation']:.4f}, {target}."
        )
    sparse = "" if figures["sparse_step"] else "; the sparse stage was not reached"
    return f"Sparsity has not settled: {figures['final_sparsity']:.4f} at the last step, {target}{sparse}."


def _longer(config: TrainConfig, model: RemoeConfig) -> str:
    steps = max(2 * config.steps, 4 * SETTLED_STEPS)
    smooth = "" if model.sparsity["rule"] == "smooth" else ", or --sparsity.rule smooth, with which it settles earlier"
    return f"For a sparsity that settles, train longer: a new run with --steps {steps}{smooth}."


def _experts(experts: int, unused: list[int]) -> list[str]:
    layers, width = len(unused), experts // len(unused)
    shape = f"({layers} layer{'s' * (layers > 1)} of {width})"
    if not sum(unused):
        return [f"All {experts} experts are in use {shape}."]
    idle = sum(unused)
    have, their = ("the others have", "their") if idle > 1 else ("the other has", "its")
    rest = f"{have} less than an eighth of {their} share of the validation tokens"
    said = [f"{experts - idle} of {experts} experts are in use {shape}: {rest}."]
    if closed := [str(layer) for layer, count in enumerate(unused) if count == width]:
        many = len(closed) > 1
        said.append(f"Layer{'s' * many} {', '.join(closed)} hardly use{'s' * (not many)} any expert.")
    return said
