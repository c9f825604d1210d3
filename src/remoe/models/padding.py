"""Which tokens of a batch are padding: neither attended to, nor routed, nor predicted.

Legend: B batch, S sequence.
"""

from torch import Tensor, nn

from remoe.models.loss import IGNORED_TARGET


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
