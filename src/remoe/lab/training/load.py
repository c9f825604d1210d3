"""Loading a trained model: from a run's folder, from one of its checkpoints, or from any transformers folder."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from remoe.convert.relufy.model import MODEL_TYPE, load_relufied
from remoe.errors import CheckpointError
from remoe.lab.data import load_tokenizer
from remoe.lab.data.tokenizer import vocabulary_size
from remoe.lab.training.checkpoint import verify
from remoe.lab.training.folder import RunFolder, run_of
from remoe.lab.training.shards import read_model
from remoe.models.configuration_remoe import RemoeConfig


def load_run(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Model (in evaluation mode), tokenizer and checkpoint of a run's folder, or of one of its checkpoints.

    The model is a `RemoeForCausalLM`, but for a run that trained a relufied model of transformers.

    Raises:
        CheckpointError: when there is no checkpoint, it cannot be read, or the tokenizer has more tokens than it knows.
    """
    path = Path(path)
    run = run_of(path) or RunFolder(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist or is not a folder")
    checkpoint = path if run.path != path else run.last_checkpoint(verified=True)
    if checkpoint is None:
        raise CheckpointError(f"{path} has no checkpoint yet" if run.config.exists() else f"{path} is not a run")
    if checkpoint == path:
        verify(checkpoint)
    if not (checkpoint / "config.json").is_file() or not run.tokenizer.is_dir():
        raise CheckpointError(f"{run.path} is incomplete: {checkpoint / 'config.json'} or {run.tokenizer} is missing")
    try:
        model = _loader(checkpoint)(checkpoint)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {checkpoint}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), _fitting_tokenizer(run.tokenizer, model), checkpoint


def load_model(path: str | Path, *, hub: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Model (in evaluation mode), tokenizer and location: of a run or checkpoint, or of any transformers folder.

    Args:
        path: the folder.
        hub: whether a path that does not exist is taken as a name on the Hugging Face hub.

    Raises:
        CheckpointError: when there is no model, it cannot be loaded, or the tokenizer has more tokens than it knows.
        DataError: when its tokenizer cannot be loaded.
    """
    name, path = str(path), Path(path)
    config = path / "config.json"
    if run_of(path) or not (config.is_file() or (hub and not path.exists())):
        return load_run(path)
    try:
        model = _loader(path, partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=False))(name)
    except CheckpointError:
        raise
    except Exception as error:  # the libraries that transformers reads a folder with have no common base of errors
        raise CheckpointError(f"cannot load {name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), _fitting_tokenizer(name, model), path


def _loader(folder: Path, otherwise: Callable[..., PreTrainedModel] = read_model) -> Callable[..., PreTrainedModel]:
    """What loads the model in a folder: by its type, if that is one of ours."""
    config = folder / "config.json"
    kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    ours = {RemoeConfig.model_type: lambda name: read_model(Path(name)), MODEL_TYPE: load_relufied}
    return ours.get(kind, otherwise)


def _fitting_tokenizer(name: str | Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """A tokenizer without an id that the model does not know."""
    tokenizer = load_tokenizer(name)
    size, known = vocabulary_size(tokenizer), model.get_input_embeddings().weight.shape[0]
    known = min(known, getattr(model.config, "tokenizer_size", None) or known)
    if size > known:
        raise CheckpointError(f"tokenizer {name} has {size:,} tokens, the model {known:,}: it is of another model")
    return tokenizer
