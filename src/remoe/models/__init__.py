"""The ReMoE language model on transformers' base classes."""

# First of all, so that what registers our config when AutoConfig is imported finds none of our modules half done.
import transformers.models.auto.configuration_auto  # noqa: F401
