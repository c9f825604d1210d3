"""Contents of a report that are words: facts, how the run went; and the records of its training."""

from collections.abc import Iterator

from remoe.lab.analysis.record import About
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.style import quantity
from remoe.lab.text import short_name
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.metrics import iterate_metrics
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.plan import parameters


def facts(source: Source | None, about: About | None, step: int | None) -> dict[str, str]:
    """Facts about the model and its training, by name; `step` is the step of a run's checkpoint."""
    found = {}
    if about is not None:
        found["router"] = about.router
        found["experts"] = f"{about.layers} layers of {about.experts}; target: {about.k} per token"
    if source is None:
        if path := about.model.get("path"):
            found["model"] = short_name(str(path))
        return found
    c = source.model.config
    if not isinstance(source.model, RemoeForCausalLM):
        found["model"] = type(source.model).__name__
        found["parameters"] = quantity(sum(parameter.numel() for parameter in source.model.parameters()))
        return found | _trained(source, about, step)
    found.setdefault("router", c.router)
    if c.shared_expert_size:
        found["shared expert"] = f"width {c.shared_expert_size}, used by every token"
    total, active = map(quantity, parameters(c))
    found["parameters"] = (
        total if total == active else f"{total}, of which a token uses {active} at the target sparsity"
    )
    return found | _trained(source, about, step)


def _trained(source: Source, about: About | None, step: int | None) -> dict[str, str]:
    if source.run is None:
        return {}
    config, summary = source.run.load_config(), source.run.load_summary()
    found = {"trained": f"{step:,} steps of {config.batch_size * config.seq_len:,} tokens"}
    if summary.get("steps") == step:
        everything = summary["validation"]["all"]
        found["validation loss"] = f"{everything['loss']:.4f} nats per token"
        if about is not None:
            target = f"target: {1 - about.k / about.experts:.4g}"
            found["validation sparsity"] = f"{everything['sparsity']:.4f} ({target})"
    return found


def outcome(run: RunFolder | None, step: int | None) -> list[str]:
    """Sentences of the run's summary on how it went; none for another checkpoint than the last, and from 0.1.0."""
    summary = run.load_summary() if run else {}
    said = summary.get("outcome") if summary.get("steps") == step else None
    return [sentence for sentence in said if isinstance(sentence, str)] if isinstance(said, list) else []


def training_records(run: RunFolder | None, step: int | None) -> Iterator[dict]:
    """Records of the run's metrics.jsonl up to the checkpoint's step; none for a model that is not part of a run."""
    if run is None or not run.metrics.is_file():
        return iter(())
    return (record for record in iterate_metrics(run.metrics) if record["step"] <= step)
