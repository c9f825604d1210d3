"""Existing checkpoints made ReMoE: TopK mixtures (`relufy`) and dense models (`upcycle`)."""
