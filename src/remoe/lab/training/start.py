"""What a run with `--from` knows of its starting point: RUN/start.json."""

import json
from typing import Any

from remoe.errors import CheckpointError
from remoe.lab.console import say
from remoe.lab.data import TOTAL
from remoe.lab.files import atomic_write
from remoe.lab.training.trainer import Trainer
from remoe.lab.training.validate import total


def start_of(trainer: Trainer) -> dict[str, Any]:
    """The summary's entry "start": the model's folder, and its figures on all validation text, before the first step.

    They are measured once, and kept with the run. Of a model with adapters, the hashes of the frozen weights are kept
    as well.

    Raises:
        CheckpointError: when the frozen weights have changed since the run began, or the file is damaged.
    """
    path, adapted = trainer.run.start, bool(trainer.config.lora.rank)
    if trainer.step or path.exists():
        try:
            start = json.loads(path.read_text())
            start["validation"][TOTAL]["loss"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or damaged ({error})") from error
        if adapted and start["weights"] != trainer.origin.hashes():
            raise CheckpointError(f"{trainer.origin.folder} has changed since {trainer.run.path} started from it")
        return {"start": start}
    results = trainer.validate(final=True)
    whole = total(results)
    start = {
        "from": str(trainer.origin.folder),
        "validation": {TOTAL: whole.to_dict()} | {domain: result.to_dict() for domain, result in results.items()},
    }
    if adapted:
        start["weights"] = trainer.origin.hashes()
    if trainer.ranks.first:
        atomic_write(path, json.dumps(start, indent=2).encode())
    say(f"before training: validation loss {whole.loss:.4f}, sparsity {whole.sparsity:.4f}")
    return {"start": start}
