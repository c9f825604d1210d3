"""Weight-only quantisation by torchao: weights in 8 or 4 bits, everything that is computed in the model's dtype."""

import torch
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from remoe.errors import ConfigError, missing_extra
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.routed import RoutedModel

INT4_GROUP = 32
SCHEMES = ("int8", "int4")


def quantize(model: RemoeForCausalLM, scheme: str = "int8") -> RemoeForCausalLM:
    """Quantises the experts' and the attention's weights of a model in place, for evaluation and generation.

    The embeddings, the router, the norms and the language-model head keep their dtype. A pass dequantises the active
    experts of one layer at a time. `remoe eval RUN --quantize int8` shows the loss before and after.
    `save_pretrained` and `from_pretrained` keep the weights as they are.

    Args:
        model: in any floating dtype, on a CPU or on CUDA.
        scheme: "int8": a scale per row of a weight. "int4": groups of 32 with a scale, where torchao has kernels for
            them (CUDA).

    Returns:
        The model.

    Raises:
        ConfigError: for an unknown scheme, int4 without CUDA, a model of another class (a relufied one for instance),
            one that is quantised already or merges its experts, or a scheme that torchao cannot do here.
        ExtraError: when torchao is not installed.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"unknown quantisation {scheme!r}; choose one of: {', '.join(SCHEMES)}")
    if not isinstance(model, RoutedModel):
        raise ConfigError(f"quantisation takes a model of this package's own class, not a {type(model).__name__}")
    if scheme == "int4" and model.device.type != "cuda":
        raise ConfigError("int4 needs CUDA; use int8")
    if model.config.router_class.merges:
        raise ConfigError(f"router {model.config.router!r} merges its experts' weights, which must not be quantised")
    try:
        from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise missing_extra(error, "quantize", "quantisation") from error
    names = _quantised_names(model)
    if any(hasattr(model.get_parameter(name), "qdata") for name in names):
        raise ConfigError("the model is quantised already")
    try:
        config = Int8WeightOnlyConfig(version=2) if scheme == "int8" else Int4WeightOnlyConfig(group_size=INT4_GROUP)
        by_name = FqnToConfig(dict.fromkeys(names, config))
        quantize_(model, by_name, filter_fn=None)
    except (ImportError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"torchao cannot quantise to {scheme} on {model.device.type}: {reason}") from error
    # With these, `save_pretrained` writes the weights as they are, and `from_pretrained` reads them so.
    model.config.quantization_config = TorchAoConfig(by_name)
    model.hf_quantizer = TorchAoHfQuantizer(model.config.quantization_config, pre_quantized=True)
    return model.eval()


def _quantised_names(model: RemoeForCausalLM) -> list[str]:
    """Matrices of attention, and three-dimensional weights of experts."""
    return [name for name, p in model.model.layers.named_parameters(prefix="model.layers") if _is_chosen(name, p)]


def _is_chosen(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 3 or (parameter.ndim == 2 and ".self_attn." in name)
