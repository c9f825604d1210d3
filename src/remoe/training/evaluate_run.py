"""Evaluation of a finished or running run from its checkpoint."""

from pathlib import Path

from remoe.data import ValidationWindows, open_dataset, tokenizer_fingerprint
from remoe.errors import CheckpointError, DataError
from remoe.training.evaluation import evaluate, total
from remoe.training.memory import keep_freed_memory
from remoe.training.rundir import RunFolder, load_run
from remoe.training.trainer import pick_device


def evaluate_run(
    path: str, data: str | None, *, split: str, max_tokens: int | None, batch_size: int
) -> tuple[Path, Path, dict[str, dict[str, float]]]:
    """Figures of a run's newest checkpoint, or of a given one.

    Args:
        path: a run's folder or one of its checkpoints.
        data: prepared data; None for the data that the run was trained with.
        split: "validation" or "train".
        max_tokens: in all, shared out over the domains by size; None for all.
        batch_size: sequences per forward pass.

    Returns:
        Checkpoint, data folder, and figures by domain, "all" last.

    Raises:
        CheckpointError: when there is no usable checkpoint, or the run's data is not known.
        DataError: when the data was made with another tokenizer.
    """
    keep_freed_memory()
    model, tokenizer, checkpoint = load_run(path)
    model.to(pick_device("auto"))
    run = RunFolder(checkpoint.parent.parent)
    folder = data or run.load_config().data
    if folder is None:
        raise CheckpointError(f"{run.config} names no data; give --data")
    dataset = open_dataset(Path(folder))
    if dataset.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise DataError(f"{folder} was prepared with another tokenizer than {run.path} was trained with")
    windows = ValidationWindows(getattr(dataset, split), model.config.max_position_embeddings)
    results = evaluate(model, windows, batch_size=batch_size, max_tokens=max_tokens)
    rows = {domain: result.to_dict() for domain, result in results.items()}
    return checkpoint, dataset.path, rows | {"all": total(results).to_dict()}
