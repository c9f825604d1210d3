"""The ReMoE language model on transformers' base classes."""

# First of all, so that what registers with the Auto classes when they are imported finds none of our modules half done.
import transformers.models.auto.modeling_auto  # noqa: F401
