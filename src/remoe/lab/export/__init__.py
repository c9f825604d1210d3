"""A trained model as a folder that transformers loads without this package; a relufied one needs it."""

import json
import shutil
from pathlib import Path

from remoe.convert.relufy.model import RelufiedMixin
from remoe.errors import CheckpointError, ConfigError
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.data.tokenizer import vocabulary_size
from remoe.lab.export.card import write_card
from remoe.lab.export.header import check_licence
from remoe.lab.files import check_new_folder, new_folder
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.load import load_run
from remoe.lab.training.validate import evaluate, total
from remoe.models.bundle import AUTO_MAP, write_bundle
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.quantization import quantize
from remoe.routing import ROUTERS


def export_run(
    run: str | Path,
    out: str | Path,
    max_experts: int | None = None,
    scheme: str | None = None,
    licence: str | None = None,
    *,
    trim: bool = False,
) -> Path:
    """Writes the model of a run, or of one of its checkpoints, with tokenizer, code and model card.

    A relufied model of transformers is written without code: `remoe.load_relufied` loads it.

    Args:
        run: the run's folder or a checkpoint's.
        out: a new or empty folder.
        max_experts: the most experts of a token (see `RemoeConfig`); the card then has the loss with and without this
            cap, on the run's validation text. None for no cap.
        scheme: "int8" or "int4" for weights as `remoe.quantize` makes them; the card then has the loss before and
            after. None to leave them as they are.
        licence: identifier of the model's licence on the Hugging Face Hub, such as "apache-2.0", for the card.
        trim: whether to leave out the rows of embeddings and head that no token of the tokenizer has.

    Returns:
        `out`.

    Raises:
        CheckpointError: when there is no checkpoint to read.
        ConfigError: when `out` holds something already, the router is not of this package or has no pairs to cap, the
            licence is no identifier, or a relufied model is to be capped or quantised.
        DataError: when there is a cap or a quantisation to measure, and the run's data is gone.
        ExtraError: when torchao is needed and not installed.
    """
    out = Path(out)
    check_new_folder(out)  # before the work, not after it
    if licence is not None:
        check_licence(licence)
    model, tokenizer, checkpoint = load_run(run)
    relufied = isinstance(model, RelufiedMixin)
    if relufied and not (max_experts is scheme is None):
        raise ConfigError(f"{run} trained a {type(model).__name__}, which cannot be exported with a cap or quantised")
    if not relufied and not ROUTERS[model.config.router].__module__.startswith("remoe.routing."):
        raise ConfigError(f"router {model.config.router!r} is not of this package: its code would be missing in {out}")
    if (folder := run_of(checkpoint)) is None:
        raise CheckpointError(f"{run} holds no run: its config.yaml is missing")
    if trim and (known := vocabulary_size(tokenizer)) < model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(known)
    capped = None if max_experts is None else _capped(model, folder, max_experts)
    quantised = None if scheme is None else _quantised(model, folder, scheme)
    with new_folder(out) as written:
        if relufied:
            model.save_pretrained(written)
        else:
            export_model(model, written)
        shutil.copytree(folder.tokenizer, written, dirs_exist_ok=True)
        write_card(folder, checkpoint, model, written, capped, quantised, licence)
    return out


def _capped(model: RemoeForCausalLM, run: RunFolder, max_experts: int) -> tuple[float, float]:
    """Puts a cap into a model's configuration; returns its validation loss without and with it."""
    without = _loss(model, run)
    model.set_max_experts(max_experts)
    model.config.max_experts = max_experts
    return without, _loss(model, run)


def _quantised(model: RemoeForCausalLM, run: RunFolder, scheme: str) -> tuple[str, float, float]:
    """Quantises a model; returns the scheme, and its validation loss before and after."""
    before = _loss(model, run)
    quantize(model, scheme)
    return scheme, before, _loss(model, run)


def _loss(model: RemoeForCausalLM, run: RunFolder) -> float:
    """Nats per token of the run's validation text."""
    config = run.load_config()
    dataset = open_dataset(config.data)
    windows, end = ValidationWindows(dataset.validation, config.seq_len), dataset.eos_token_id
    end = end if config.mask_documents else None
    return total(evaluate(model, windows, batch_size=config.validate.batch_size, document_end=end)).loss


def export_model(model: RemoeForCausalLM, out: Path) -> None:
    """Writes weights, configuration and code; `out` must be there."""
    model.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = AUTO_MAP
    config["backend"] = "auto"  # one that was forced may not be in the bundle
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_bundle(out)
