"""The picture of an exported model's routing: which experts each domain of the validation text uses."""

import logging
from pathlib import Path

from transformers import PreTrainedModel

from remoe.errors import DataError
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.routing_figures import routed_share_by_domain
from remoe.lab.analysis.style import save_png
from remoe.lab.analysis.summary import routing_of
from remoe.lab.analysis.texts import PreparedText
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.training.folder import RunFolder
from remoe.models.modeling_remoe import RemoeForCausalLM

logger = logging.getLogger(__name__)

NAME = "routing"
TOKENS = 8192  # of the validation text; a model of 182 million parameters needs seconds for them on a CPU


def routing_picture(model: PreTrainedModel, run: RunFolder, out: Path) -> str | None:
    """Writes the share of each domain's tokens that each expert takes, as PNG.

    Args:
        model: as it is exported.
        run: the run that trained it, whose validation text it reads.
        out: existing folder.

    Returns:
        The section of the model card, in Markdown; None for a model that routes no single tokens. Where the run's data
        is gone, the section says so instead of showing the picture.
    """
    if isinstance(model, RemoeForCausalLM) and not model.config.routes_pairs:
        return None
    config = run.load_config()
    try:
        dataset = open_dataset(config.data)
    except DataError as error:
        logger.warning("the model card has no picture of the routing: %s", error)
        return "The data of the run was not there when the model was exported, so the routing is not shown.\n"
    text = PreparedText(ValidationWindows(dataset.validation, config.seq_len), TOKENS)
    end = dataset.eos_token_id if config.mask_documents else None
    record = record_routing(Mixture(model), text, losses=False, document_end=end)
    seen = routing_of(record)
    save_png(routed_share_by_domain(seen.share_CLE, seen.domains, record.about.k), out / NAME)
    return (
        f"![Share of each domain's tokens that each expert of each layer takes]({NAME}.png)\n\n"
        "Share of each domain's tokens that each expert takes, and the mean number of active experts of a token in "
        f"each layer, on {record.about.tokens:,} tokens of the validation text.\n"
    )
