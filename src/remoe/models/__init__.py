"""The ReMoE language model on transformers' base classes."""
