"""Existing checkpoints made ReMoE: TopK mixtures (`relufy`), dense models (`upcycle`), the authors' (`megatron`)."""
