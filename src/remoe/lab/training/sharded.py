"""The model of a run on several processes: none of them ever has all of it, one whole matrix at most."""

import torch

from remoe.lab.data import Dataset
from remoe.lab.training.build import model_config
from remoe.lab.training.checkpoint import list_checkpoints
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.origin import Origin
from remoe.lab.training.ranks import Ranks
from remoe.models.deferred import Deferred, allocate
from remoe.models.modeling_remoe import RemoeForCausalLM


def build_sharded(
    config: TrainConfig, dataset: Dataset, run: RunFolder, ranks: Ranks, origin: Origin | None
) -> RemoeForCausalLM:
    """A model spread over the ranks, with the values that a run on one process starts with, bit for bit.

    The model of a run that has a checkpoint is left without values, which `Trainer.resume` reads.

    Raises:
        ConfigError: for a model that cannot be built.
        CheckpointError: when the model that the run starts from cannot be read.
    """
    has_checkpoint = config.resume and bool(list_checkpoints(run.checkpoints))
    read_later = bool(ranks.agree(int(ranks.first and has_checkpoint)))
    shape = origin.configured(config) if origin else model_config(config, dataset.vocab_size, dataset.eos_token_id)
    with Deferred(draw=origin is None and not read_later) as deferred:
        model = RemoeForCausalLM(shape)
    deferred.remember(model)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(ranks.device))
    ranks.shard(model)
    allocate(model, ranks.device)
    if origin is not None and not read_later:
        origin.fill(model, config)
    elif origin is None and not read_later:
        deferred.fill(model)
    if origin is not None:
        torch.manual_seed(config.seed)  # as on one process, where loading may draw numbers
    return model
