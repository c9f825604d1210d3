"""Attention with our rotation and products against transformers' forward pass."""

import pytest
import reference
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from remoe.experts.cpu.build import compiled_kernels
from remoe.models import attention as module
from remoe.models.attention import CACHE_NAME, build_attention
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.rotary import RotaryEmbedding, rotate, rotate_packed

KERNELS = pytest.mark.skipif(compiled_kernels(torch.float32) is None, reason="no compiled kernels here")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def heads_and_angles(B: int, S: int, H: int, G: int, d: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as the projections leave them, side by side, and angles with unlike halves."""
    return [torch.randn(*shape).to(dtype) for shape in ((B, S, (H + 2 * G) * d), (rows, S, d), (rows, S, d))]


def formula(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (H + 2 * G, -1)).split((H, G, G), dim=2))
    return *apply_rotary_pos_emb(q, k, cos, sin), v


def by_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (H + 2 * G, -1)).split((H, G, G), dim=2))
    return *rotate(q, k, cos, sin), v


def with_gradient(turn, tensors: list[Tensor], H: int, G: int) -> list[Tensor]:
    qkv, cos, sin = tensors
    qkv = qkv.clone().requires_grad_()
    outputs = turn(qkv, cos, sin, H, G)
    torch.manual_seed(1)
    gradients = [torch.randn(out.shape).to(out.dtype) for out in outputs]  # in another layout than the outputs
    return [*outputs, *torch.autograd.grad(outputs, qkv, gradients)]


@pytest.mark.parametrize("sizes", [(2, 63, 6, 2, 20, 1), (3, 5, 2, 2, 6, 3), (1, 1, 1, 1, 2, 1), (0, 3, 2, 1, 4, 1)])
@pytest.mark.parametrize(
    ("turn", "dtype"),
    [
        *((by_rotate, dtype) for dtype in TOLERANCE),
        *(pytest.param(rotate_packed, dtype, marks=KERNELS) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_rotation_and_its_gradients_are_the_formulas(turn, sizes, dtype):
    tensors, (H, G) = heads_and_angles(*sizes, dtype), sizes[2:4]
    got, expected = with_gradient(turn, tensors, H, G), with_gradient(formula, tensors, H, G)
    for mine, other in zip(got, expected, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert mine.numel() == 0 or reference.relative_error(mine, other) < TOLERANCE[dtype]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(turn(*tensors, H, G), got[:3], strict=True))


@pytest.mark.parametrize("turn", [by_rotate, pytest.param(rotate_packed, marks=KERNELS)])
def test_gradients_of_gradients_of_the_rotation(turn):
    tensors = heads_and_angles(2, 3, 2, 1, 4, 1, torch.float32)
    for mine, other in zip(*(second_gradient(f, tensors) for f in (turn, formula)), strict=True):
        assert reference.relative_error(mine, other) < 1e-5
        assert mine.any()


def second_gradient(turn, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    qkv, cos, sin = tensors
    qkv = qkv.clone().requires_grad_()
    (first,) = torch.autograd.grad(sum(out.pow(3).sum() for out in turn(qkv, cos, sin, 2, 1)), qkv, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), qkv)


def test_learned_angles_and_tracers_get_the_formula():
    q, k, cos, sin = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    learned = cos.clone().requires_grad_()
    assert torch.autograd.grad(rotate(q, k, learned, sin)[0].sum(), learned)[0].any()
    graph = torch.fx.experimental.proxy_tensor.make_fx(rotate)(q, k, cos, sin)
    other = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(graph(other, k, cos, sin), rotate(other, k, cos, sin))
    with FakeTensorMode() as mode:
        assert rotate(*(mode.from_tensor(tensor) for tensor in (q, k, cos, sin)))[0].shape == (1, 2, 3, 4)


def attention_of(**options) -> tuple[module.PlainAttention | module.NormedAttention, tuple[Tensor, Tensor]]:
    config = RemoeConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=16, **options
    )
    config._attn_implementation = "sdpa"
    return build_attention(config, 0), RotaryEmbedding(config)(torch.zeros(1), position_ids=torch.arange(7)[None])


def attend(forward, attention: torch.nn.Module, x: Tensor, angles: tuple[Tensor, Tensor], **options) -> list[Tensor]:
    y, _ = forward(attention, x, angles, None, **options)
    return [y, *torch.autograd.grad(y.float().pow(2).sum(), [x, *attention.parameters()])]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_that_of_transformers(qk_norm):
    attention, angles = attention_of(qk_norm=qk_norm)
    theirs, x = Qwen3Attention if qk_norm else LlamaAttention, torch.randn(2, 7, 24, requires_grad=True)
    expected = attend(theirs.forward, attention, x, angles)
    hooked = [] if qk_norm else [attend_with_a_hook(attention, x, angles)]
    for got in (attend(type(attention).forward, attention, x, angles), *hooked):
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def attend_with_a_hook(attention: torch.nn.Module, x: Tensor, angles: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The hook must see the projection's output: it is not computed beside the others then."""
    seen = []
    handle = attention.k_proj.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    got = attend(type(attention).forward, attention, x, angles)
    handle.remove()
    assert seen == [(2, 7, 12)]
    return got


def test_attention_under_autocast_and_with_a_cache():
    from transformers.cache_utils import DynamicCache

    attention, angles = attention_of()
    x = torch.randn(2, 7, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (attend(f, attention, x, angles) for f in (type(attention).forward, LlamaAttention.forward))
    assert got[0].dtype is torch.bfloat16
    for mine, other in zip(got, expected, strict=True):
        assert reference.relative_error(mine, other) < 2e-2
    whole = attention(x, angles)[0]
    cache, parts = DynamicCache(), []
    for position in range(7):
        turned = tuple(angle[:, position : position + 1] for angle in angles)
        parts.append(attention(x[:, position : position + 1], turned, None, **{CACHE_NAME: cache})[0])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)
