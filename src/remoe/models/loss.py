"""The language model's loss: which positions are targets, and the cross-entropy without ever holding the logits.

The language-model head of a small model is most of its memory traffic: T x V logits, their softmax and its gradient
are each read and written several times. Here a chunk of tokens goes all the way, logits to gradients, while it is in
cache. The gradients are computed in the forward pass, up to the factor that arrives in the backward pass: that saves
the second product for the logits that recomputing them would need.

Legend: B batch, S sequence, T tokens, D model width, V vocabulary, t tokens of one chunk.
"""

import torch
from torch import Tensor, nn

from remoe.experts.cpu.build import compiled_kernels
from remoe.matmul import add_product, product
from remoe.operators import operator_name

UNUSED_LOGIT = -1e30  # of an id that no token has
IGNORED_TARGET = -100
# Logits of one chunk: few enough to stay in a CPU's cache, and many where a chunk must fill a GPU. The least number
# of tokens keeps the sum over chunks of the weight's gradient, (D, V) each, from costing more than the products.
CHUNK_LOGITS = {"cpu": 2**21}
CHUNK_LOGITS_DEVICE = 2**26
CHUNK_TOKENS = 512


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight^T), once differentiable in the first two.

    The products run in the dtype of the operands (that of autocast under autocast), softmax and sums in at least
    float32. At most one chunk of logits exists at a time.

    Args:
        hidden_TD, weight_VD: (T, D), (V, D), of one dtype.
        target_T: (T,) int64; -100 is no target and adds nothing.

    Returns:
        0-dim, float32 (float64 for float64 operands), in nats.
    """
    device = hidden_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    grad = torch.is_grad_enabled()
    hidden_grad, weight_grad = grad and hidden_TD.requires_grad, grad and weight_VD.requires_grad
    return _forward(hidden_TD, weight_VD, target_T, hidden_grad, weight_grad)[0]


class LossHead(nn.Linear):
    """A language-model head that computes the loss itself: FSDP has its weight whole only while the head is called.

    Attributes:
        own_hooks: how many hooks FSDP has registered.
    """

    own_hooks = 0

    def forward(self, x: Tensor, target_T: Tensor | None = None, tokens: int | None = None) -> Tensor:
        """(..., D) to logits (..., V); or with targets `linear_cross_entropy`, over the first `tokens` ids."""
        if target_T is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight[:tokens], target_T)

    def count_hooks(self) -> int:
        """How many hooks a call of the head passes by."""
        return len(self._forward_hooks) + len(self._forward_pre_hooks)


def is_plain_head(head: nn.Module) -> bool:
    """Whether a head is one linear layer: offloading, tensor parallelism, adapters and users' hooks wrap it."""
    if hasattr(head, "_hf_hook") or "forward" in vars(head):
        return False
    if isinstance(head, LossHead):
        return head.bias is None and head.count_hooks() == head.own_hooks
    return type(head) is nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)


@torch.library.custom_op(operator_name("linear_cross_entropy"), mutates_args=())
def _forward(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its gradients by hidden, (T, D), and by the transposed weight, (D, V); empty unless asked for."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    dtype = _accumulation_dtype(hidden_TD)
    total = hidden_TD.new_zeros((), dtype=dtype)
    dhidden_TD = hidden_TD.new_empty((T, D) if hidden_grad else 0)
    dweight_DV = weight_VD.new_zeros((D, V) if weight_grad else 0, dtype=dtype)
    weight_DV = weight_VD.t()
    chunk = _chunk_tokens(V, hidden_TD.device.type)
    for start in range(0, T, chunk):
        hidden_tD, target_t = hidden_TD[start : start + chunk], target_T[start : start + chunk]
        counts_t1 = (target_t != IGNORED_TARGET)[:, None]
        logits_tV = product(hidden_tD, weight_DV).to(dtype)
        nats_t1, dlogits_tV = _cross_entropy(logits_tV, target_t[:, None].where(counts_t1, 0))
        total += nats_t1.where(counts_t1, 0).sum()
        if not (hidden_grad or weight_grad):
            continue
        dlogits_tV = dlogits_tV.to(hidden_TD.dtype)
        # A token without a target is masked in the (t, D) factors: a pass over (t, V) would cost more.
        if hidden_grad:
            dhidden_TD[start : start + chunk] = product(dlogits_tV, weight_VD).where(counts_t1, 0)
        if weight_grad:
            add_product(dweight_DV, hidden_tD.where(counts_t1, 0).t(), dlogits_tV)
    return total, dhidden_TD, dweight_DV


def _cross_entropy(logits_tV: Tensor, target_t1: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target, (t, 1), and their gradients by the logits, softmax - onehot, in the logits' memory."""
    kernels = compiled_kernels(logits_tV.dtype) if logits_tV.device.type == "cpu" else None
    if kernels is not None and logits_tV.dtype is torch.float32:
        target_t1 = target_t1.to(torch.int64).contiguous()  # the kernel's type
        nats_t1 = torch.empty_like(target_t1, dtype=torch.float32)
        addresses = logits_tV.data_ptr(), target_t1.data_ptr()
        if not kernels.cross_entropy(*addresses, *logits_tV.shape, nats_t1.data_ptr()):
            raise IndexError(f"a target is not one of the {logits_tV.shape[1]} ids of the vocabulary")
        return nats_t1, logits_tV
    # log sum exp = max - log(largest probability): one pass of exponentials gives loss and gradient.
    largest_t1, target_logit_t1 = logits_tV.amax(dim=1, keepdim=True), logits_tV.gather(1, target_t1)
    prob_tV = logits_tV.softmax(dim=1)
    nats_t1 = largest_t1 - prob_tV.amax(dim=1, keepdim=True).log() - target_logit_t1
    return nats_t1, prob_tV.scatter_add_(1, target_t1, prob_tV.new_full((), -1).expand_as(target_t1))


@_forward.register_fake
def _(hidden_TD, weight_VD, target_T, hidden_grad, weight_grad):
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    dtype = _accumulation_dtype(hidden_TD)
    return (
        hidden_TD.new_empty((), dtype=dtype),
        hidden_TD.new_empty((T, D) if hidden_grad else 0),
        weight_VD.new_empty((D, V) if weight_grad else 0, dtype=dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.needed = inputs[3:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the size of both gradients


def _differentiate(ctx, scale, *_):
    if torch.is_grad_enabled():  # create_graph: the saved gradients would count as constants
        raise RuntimeError("linear_cross_entropy cannot be differentiated twice")
    if scale is None:
        return (None,) * 5
    dhidden_TD, dweight_DV = ctx.saved_tensors
    hidden_grad, weight_grad = ctx.needed
    # Not in 16 bits: rounded to them, 1 / targets would scale every gradient wrongly.
    dhidden_TD = dhidden_TD.to(scale.dtype, copy=True).mul_(scale).to(dhidden_TD.dtype) if hidden_grad else None
    dweight_VD = (dweight_DV * scale).t().to(ctx.dtype, memory_format=torch.contiguous_format) if weight_grad else None
    return dhidden_TD, dweight_VD, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunk_tokens(V: int, device: str) -> int:
    return max(CHUNK_TOKENS, CHUNK_LOGITS.get(device, CHUNK_LOGITS_DEVICE) // V)


def is_padding_mask(mask: object) -> bool:
    """Whether a mask says which tokens are padding; transformers also hands on ready masks for attention."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def padding_mask(attention_mask: object, token_mask: Tensor | None) -> Tensor | None:
    """(B, past + S) or (B, S), zero for padding: the second where it is given; None where neither tells padding."""
    if token_mask is not None:
        return token_mask
    return attention_mask if is_padding_mask(attention_mask) else None


def shifted_targets(labels: Tensor | None, shift_labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, S) targets of each position, -100 where there is none: padding neither is predicted nor predicts.

    Args:
        labels: (B, S) int64, the tokens themselves; or
        shift_labels: (B, S) int64, targets already shifted.
        mask: of `padding_mask`.
    """
    if labels is None and shift_labels is None:
        return None
    padding_BS = None if mask is None else ~mask.bool()
    if shift_labels is None:
        if padding_BS is not None:
            labels = labels.masked_fill(padding_BS[:, -labels.shape[1] :], IGNORED_TARGET)
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_TARGET)
    if padding_BS is not None:
        shift_labels = shift_labels.masked_fill(padding_BS[:, -shift_labels.shape[1] :], IGNORED_TARGET)
    return shift_labels


def without_unused_ids(logits: Tensor, tokens: int) -> Tensor:
    """(..., V): the logits of ids below `tokens`; those of the others, which no token has, become very low."""
    # Finite, and still so when divided by a temperature: 0 * log 0 in an entropy stays 0.
    low = max(UNUSED_LOGIT, torch.finfo(logits.dtype).min)
    return nn.functional.pad(logits[..., :tokens], (0, logits.shape[-1] - tokens), value=low)
