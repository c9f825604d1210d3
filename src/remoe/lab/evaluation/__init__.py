"""Evaluation of trained models: loss by domain, thresholds, and zero-shot tasks."""
