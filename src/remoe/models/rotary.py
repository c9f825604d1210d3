"""Rotary position embeddings: queries and keys turned by one kernel, on the CPU of a machine that can compile it.

transformers' formula reads and writes queries and keys once for each of its eight operations, and as often again for
their gradients.

Legend: B batch, S sequence, T = B S tokens, H heads of queries, G heads of keys and values, d width of a
head, P width of all heads together.
"""

import ctypes

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from remoe.experts.cpu.build import Heads, compiled_kernels
from remoe.models.kernels import kernels_for
from remoe.routing.float32 import Float32State


class RotaryEmbedding(Float32State, LlamaRotaryEmbedding):
    """LLaMA's rotary embedding; its frequencies stay float32: rounded, they turn far positions by wrong angles."""

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        self.keep_float32()
        return super().forward(*args, **kwargs)


def rotate(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`, whose formula runs wherever the kernels do not; the kernels round less often.

    Args:
        q_BHSd, k_BGSd: (B, H, S, d) and (B, G, S, d).
        cos_BSd, sin_BSd: (B, S, d), or (1, S, d) for positions that all rows share.

    Returns:
        Like q and k.
    """
    tensors = q_BHSd, k_BGSd, cos_BSd, sin_BSd
    if kernels_for(*tensors) is None or cos_BSd.requires_grad or sin_BSd.requires_grad:
        return apply_rotary_pos_emb(*tensors)
    turn = _Rotation.apply if torch.is_grad_enabled() else _Rotation.forward
    return turn(*tensors, False)


def rotate_packed(
    qkv_BSP: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate`, and the values, of projections side by side: P = (H + 2 G) d; where `kernels_for` these tensors exist.

    Returns:
        (B, H, S, d), (B, G, S, d), (B, G, S, d): queries and keys turned, and values.
    """
    turn = _PackedRotation.apply if torch.is_grad_enabled() else _PackedRotation.forward
    return turn(qkv_BSP, cos_BSd, sin_BSd, heads, groups)


class _Rotation(torch.autograd.Function):
    """With `back` the transposed map, which is the derivative."""

    @staticmethod
    def forward(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        # Of a token all heads lie side by side, as the projections leave them: nothing is copied.
        given = [tensor.transpose(1, 2).contiguous() for tensor in (q_BHSd, k_BGSd)]
        turned = [torch.empty_like(tensor) for tensor in given]
        _turn(given, cos_BSd, sin_BSd, turned, back)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *_, cos_BSd, sin_BSd, ctx.back = inputs
        ctx.save_for_backward(cos_BSd, sin_BSd)

    @staticmethod
    def backward(ctx, dq_BHSd: Tensor, dk_BGSd: Tensor) -> tuple[Tensor | None, ...]:
        return *_Rotation.apply(dq_BHSd, dk_BGSd, *ctx.saved_tensors, not ctx.back), None, None, None


class _PackedRotation(torch.autograd.Function):
    @staticmethod
    def forward(
        qkv_BSP: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, heads: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = _split(qkv_BSP.contiguous(), heads, groups)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in packed]
        _turn(packed, cos_BSd, sin_BSd, parts, False)
        return parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx, dq_BHSd: Tensor, dk_BGSd: Tensor, dv_BGSd: Tensor) -> tuple[Tensor | None, ...]:
        cos_BSd, sin_BSd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: by an operator whose derivative is known
            dq_BHSd, dk_BGSd = _Rotation.apply(dq_BHSd, dk_BGSd, cos_BSd, sin_BSd, True)
            dqkv_BSP = torch.cat([d.transpose(1, 2).flatten(2) for d in (dq_BHSd, dk_BGSd, dv_BGSd)], dim=-1)
            return dqkv_BSP, None, None, None, None
        parts = [tensor.transpose(1, 2).contiguous() for tensor in (dq_BHSd, dk_BGSd, dv_BGSd)]
        (B, S, heads, d), groups = parts[0].shape, parts[1].shape[2]
        dqkv_BSP = dq_BHSd.new_empty(B, S, (heads + 2 * groups) * d)
        _turn(parts, cos_BSd, sin_BSd, _split(dqkv_BSP, heads, groups), True)
        return dqkv_BSP, None, None, None, None


def _split(qkv_BSP: Tensor, heads: int, groups: int) -> list[Tensor]:
    """Queries (B, S, H, d), keys and values (B, S, G, d), as views."""
    heads_BSNd = qkv_BSP.unflatten(-1, (heads + 2 * groups, -1))
    return list(heads_BSNd.split((heads, groups, groups), dim=2))


def _turn(given: list[Tensor], cos_BSd: Tensor, sin_BSd: Tensor, turned: list[Tensor], back: bool) -> None:
    """Turns queries (B, S, H, d) and keys (B, S, G, d), and copies values, if there are any, into other tensors."""
    (B, S, H, d), G = given[0].shape, given[1].shape[2]
    cos_BSd, sin_BSd = cos_BSd.contiguous(), sin_BSd.contiguous()
    kernels = compiled_kernels(given[0].dtype)
    angles = cos_BSd.data_ptr(), sin_BSd.data_ptr()
    kernels.rotate(_heads(given), *angles, _heads(turned), B * S, len(cos_BSd) * S, H, G, d, back)


def _heads(parts: list[Tensor]) -> ctypes.Array:
    absent = [0] * (3 - len(parts))
    addresses, rows = [part.data_ptr() for part in parts], [part.stride(1) for part in parts]
    return Heads(*addresses, *absent, *rows, *absent)
