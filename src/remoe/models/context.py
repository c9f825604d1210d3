"""How long the sequences of a language model may be."""

from transformers import PreTrainedModel


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most tokens of a sequence that a model is for; None if it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
