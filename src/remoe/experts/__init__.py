"""Experts: the weights of a layer's feed-forward networks, and the backends that run the routed pairs through them."""

from remoe.experts.dispatch import ALIASES, BACKENDS, check_backend, resolve_backend
from remoe.experts.merged import MergedExperts
from remoe.experts.module import STORED_RATIO, Experts, autocast_tensors, is_quantised, run_experts, stored_pairs
from remoe.experts.naive import naive_experts

__all__ = [
    "ALIASES",
    "BACKENDS",
    "STORED_RATIO",
    "Experts",
    "MergedExperts",
    "autocast_tensors",
    "check_backend",
    "is_quantised",
    "naive_experts",
    "resolve_backend",
    "run_experts",
    "stored_pairs",
]
