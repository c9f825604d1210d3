"""Named model sizes with their training settings.

`182m`, `469m` and `978m` are the paper's models and schedule (arXiv 2412.14711, section 4). `tiny` trains in minutes on
a laptop's CPU; `mini` is for experiments at reduced scale. No torch import: the command line reads this for help.
"""

from remoe.errors import ConfigError

_PAPER = {
    "steps": 60_000,
    "seq_len": 1024,
    "batch_size": 512,
    "micro_batch_size": 16,
    "vocab_size": 51_200,
    "optim": {"lr": 5e-4, "final_lr_ratio": 0.1, "warmup_ratio": 0.01},
    "sparsity": {"rule": "sign", "lambda_init": 1e-8, "alpha": 1.2, "fast_start": False},
    "validate": {"every": 1000, "max_tokens": 1_000_000},
    "checkpoint": {"every": 1000},
}
_SMALL = {
    "seq_len": 256,
    "batch_size": 16,
    "micro_batch_size": 16,
    "vocab_size": 4096,
    "optim": {"lr": 2e-3, "final_lr_ratio": 0.1, "warmup_ratio": 0.02},
    "sparsity": {"rule": "smooth", "lambda_init": 1e-8, "alpha": 1.2, "fast_start": False},
    "validate": {"every": 100, "max_tokens": 40_000},
    "checkpoint": {"every": 100},
}


def _model(width: int, layers: int, heads: int, groups: int, std: float) -> dict[str, int | float]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "initializer_range": std,
    }


PRESETS: dict[str, dict] = {
    # Routers that start at 0.02 turn round within few steps at this learning rate, and close some experts for good.
    "tiny": {**_SMALL, "steps": 500, "model": {**_model(128, 4, 4, 2, 0.02), "router_std": 0.1}},
    "mini": {**_SMALL, "steps": 1200, "model": _model(192, 4, 6, 2, 0.02)},
    "182m": {**_PAPER, "model": _model(768, 12, 12, 4, 0.01)},
    "469m": {**_PAPER, "model": _model(1024, 24, 16, 4, 0.01)},
    "978m": {**_PAPER, "model": _model(1536, 24, 16, 4, 0.01)},
}


def preset(name: str) -> dict:
    """The settings of a preset.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]
