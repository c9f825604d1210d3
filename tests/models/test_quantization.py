"""Quantised weights: close to the originals, smaller, and run by every path of the experts."""

import pytest
import torch

from remoe import RemoeConfig, RemoeForCausalLM
from remoe.errors import ConfigError
from remoe.experts import is_quantised

torchao = pytest.importorskip("torchao")

from remoe.models.quantization import SCHEMES, quantize  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}


def weight_bytes(model):
    """Bytes of all parameters as they are stored; of a quantised one, its integers, scales and zero points."""

    def stored(tensor):
        if not hasattr(tensor, "qdata"):
            return tensor.numel() * tensor.element_size()
        parts = (value for value in vars(tensor).values() if isinstance(value, torch.Tensor))
        return sum(part.numel() * part.element_size() for part in parts)

    return sum(stored(parameter) for parameter in model.parameters())


def build(**options):
    torch.manual_seed(0)
    return RemoeForCausalLM(RemoeConfig(**SIZES, initializer_range=0.05, **options)).eval()


def rounded(weight):
    """Symmetric int8 with a scale per row, in plain operations."""
    scale = (weight.abs().amax(dim=-1, keepdim=True) / 127.5).clamp(min=1e-12)
    return (weight / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_int8_equals_the_rounded_weights(router, tokens):
    model = build(router=router)
    ids = torch.randint(64, (2, tokens))
    expected = build(router=router)
    for name, parameter in expected.model.layers.named_parameters():
        if parameter.ndim == 3 or (".self_attn." in name and parameter.ndim == 2):
            parameter.data = rounded(parameter.data)
    before, full = weight_bytes(model), model(ids).logits
    quantize(model)
    experts = model.model.layers[0].mlp.experts
    assert is_quantised(experts.gate_up_proj)
    assert weight_bytes(model) < before / 2
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected(ids).logits, atol=2e-2 * full.std().item(), rtol=0)
    assert (logits - full).std() < 0.05 * full.std()
    out = model(ids, labels=ids)
    assert out.loss.isfinite()
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, tokens + 3)


@pytest.mark.parametrize("router", ["relu", "dense"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "tie_word_embeddings": True, "shared_expert_size": 32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_computes_the_same(router, options, dtype, tmp_path):
    model = quantize(build(router=router, **options).to(dtype))
    model.sparsity.lam.fill_(0.123)
    model.save_pretrained(tmp_path / "once")
    again = RemoeForCausalLM.from_pretrained(tmp_path / "once", dtype=dtype).eval()
    again.save_pretrained(tmp_path / "twice")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    for loaded in (again, RemoeForCausalLM.from_pretrained(tmp_path / "twice", dtype=dtype).eval()):
        assert is_quantised(loaded.model.layers[0].mlp.experts.gate_up_proj)
        assert weight_bytes(loaded) == weight_bytes(model)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(loaded.sparsity.lam, model.sparsity.lam)
        with pytest.raises(ConfigError, match="already"):
            quantize(loaded)


@pytest.mark.parametrize(
    "options", [{}, {"router": "dense"}, {"max_experts": 2, "shared_expert_size": 32, "qk_norm": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_saved_and_loaded_computes_the_same(options, dtype, tmp_path):
    model, ids = build(**options), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    before, full = weight_bytes(model), model(ids).logits
    model = quantize(model, "int4").to(dtype)
    assert weight_bytes(model) < before / 2
    assert 0 < (model(ids).logits - full).std() < 0.5 * full.std()
    model.save_pretrained(tmp_path)
    loaded = RemoeForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.config.expert_bits == 4
    assert weight_bytes(loaded) == weight_bytes(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_without_any_pair(scheme):
    model = quantize(build(), scheme)
    model.set_gate_threshold(1e9)
    assert model(torch.zeros(1, 5, dtype=torch.int64)).logits.isfinite().all()


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(ConfigError, match="unknown quantisation 'int3'"):
        quantize(build(), "int3")
    with pytest.raises(ConfigError, match="merges"):
        quantize(build(router="lory"))
    with pytest.raises(ConfigError, match="merges"):
        build(router="lory", expert_bits=4)
    with pytest.raises(ConfigError, match="expert_bits must be 4 or None, but is 3"):
        build(expert_bits=3)
    with pytest.raises(ConfigError, match="multiple of 32 numbers, but they have 16"):
        quantize(build(intermediate_size=16), "int4")
    for scheme in SCHEMES:
        model = quantize(build(), scheme)
        for other in SCHEMES:
            with pytest.raises(ConfigError, match="already"):
                quantize(model, other)
