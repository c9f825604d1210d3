"""Rotary position embeddings: queries and keys turned by one kernel, on the CPU of a machine that can compile it.

transformers' formula reads and writes queries and keys once for each of its eight operations, and as often again for
their gradients.

Legend: B batch, S sequence, T = B S tokens, H heads of queries, G heads of keys, d width of a head.
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from remoe.experts.cpu.build import compiled_kernels
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


class _Rotation(torch.autograd.Function):
    """With `back` the transposed map, which is the derivative."""

    @staticmethod
    def forward(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        # Of a token all heads lie side by side, as the projections leave them: nothing is copied.
        q_BSHd, k_BSGd = (tensor.transpose(1, 2).contiguous() for tensor in (q_BHSd, k_BGSd))
        turned = torch.empty_like(q_BSHd), torch.empty_like(k_BSGd)
        (B, S, H, d), G = q_BSHd.shape, k_BSGd.shape[2]
        cos_BSd, sin_BSd = cos_BSd.contiguous(), sin_BSd.contiguous()
        addresses = [tensor.data_ptr() for tensor in (q_BSHd, k_BSGd, cos_BSd, sin_BSd, *turned)]
        compiled_kernels(q_BHSd.dtype).rotate(*addresses, B * S, len(cos_BSd) * S, H, G, d, back)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *_, cos_BSd, sin_BSd, ctx.back = inputs
        ctx.save_for_backward(cos_BSd, sin_BSd)

    @staticmethod
    def backward(ctx, dq_BHSd: Tensor, dk_BGSd: Tensor) -> tuple[Tensor | None, ...]:
        return *_Rotation.apply(dq_BHSd, dk_BGSd, *ctx.saved_tensors, not ctx.back), None, None, None
