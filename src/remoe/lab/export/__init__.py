"""A trained model as a folder that transformers loads without this package."""

import json
import shutil
from pathlib import Path

from remoe.errors import CheckpointError, ConfigError
from remoe.lab.export.card import write_card
from remoe.lab.files import check_new_folder, new_folder
from remoe.lab.training.folder import run_of
from remoe.lab.training.load import load_run
from remoe.models.bundle import AUTO_MAP, write_bundle
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import ROUTERS


def export_run(run: str | Path, out: str | Path) -> Path:
    """Writes the model of a run, or of one of its checkpoints, with tokenizer, code and model card.

    Args:
        run: the run's folder or a checkpoint's.
        out: a new or empty folder.

    Returns:
        `out`.

    Raises:
        CheckpointError: when there is no checkpoint to read.
        ConfigError: when `out` holds something already, or the router is not of this package.
    """
    out = Path(out)
    check_new_folder(out)  # before the work, not after it
    model, _, checkpoint = load_run(run)
    if not ROUTERS[model.config.router].__module__.startswith("remoe.routing."):
        raise ConfigError(f"router {model.config.router!r} is not of this package: its code would be missing in {out}")
    if (folder := run_of(checkpoint)) is None:
        raise CheckpointError(f"{run} holds no run: its config.yaml is missing")
    with new_folder(out) as written:
        export_model(model, written)
        shutil.copytree(folder.tokenizer, written, dirs_exist_ok=True)
        write_card(folder, checkpoint, model, written)
    return out


def export_model(model: RemoeForCausalLM, out: Path) -> None:
    """Writes weights, configuration and code; `out` must be there."""
    model.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = AUTO_MAP
    config["backend"] = "auto"  # one that was forced may not be in the bundle
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_bundle(out)
