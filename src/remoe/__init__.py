"""ReMoE: mixture-of-experts with ReLU routing (arXiv 2412.14711) for PyTorch.

    layer = remoe.MoE(d_model=256, d_ffn=1024, num_experts=8, k=1)
    y, routing = layer(x)

Names are imported on first use, so that `import remoe` and the command line start quickly.
"""

from importlib import import_module

from remoe.integrations.auto import register_when_imported

__version__ = "0.1.0"

_HOME = {
    "MoE": "remoe.layer",
    "Assignment": "remoe.routing",
    "Routing": "remoe.routing",
    "ReLURouter": "remoe.routing",
    "TopKRouter": "remoe.routing",
    "SparsityController": "remoe.sparsity",
    "quantize": "remoe.models.quantization",
    "RemoeConfig": "remoe.models.configuration_remoe",
    "RemoeModel": "remoe.models.modeling_remoe",
    "RemoeForCausalLM": "remoe.models.modeling_remoe",
    "SparsityCallback": "remoe.integrations.trainer",
    "RemoeForSequenceClassification": "remoe.models.classification",
    "relufy": "remoe.convert.relufy.convert",
    "load_relufied": "remoe.convert.relufy.model",
    "upcycle": "remoe.convert.upcycle",
    "load_megatron": "remoe.convert.megatron.convert",
    "save_megatron": "remoe.convert.megatron.convert",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'remoe' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_imported()
