"""Documents packed into one row, which only their positions tell apart.

Legend: B batch, S sequence.
"""

import torch
from torch import Tensor
from transformers.masking_utils import packed_sequence_mask_function

from remoe.errors import ConfigError
from remoe.models.loss import is_padding_mask


def document_positions(token_BS: Tensor, eos_token_id: int) -> Tensor:
    """(B, S) int64: each token's position in its document, for rows of documents that end with an EOS token.

    The EOS token before a document is its position 0, so that every document's first token is predicted from the EOS
    token alone, and the last token of the document before predicts EOS: no target is lost, and none sees another
    document. A row's first document may begin without EOS, or in its middle.

    Args:
        token_BS: (B, S) int64.
        eos_token_id: the token that ends every document.
    """
    index_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
    return index_BS - index_BS.where(token_BS == eos_token_id, 0).cummax(dim=1).values


def packed_documents(position_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B, S) int64: which document of its row each token is in; None if every row is one document.

    A document ends where the position of a token is not that of the token before plus one. Padding does not count. It
    costs a host synchronisation, except in a compiled graph, which always gets the tensor.

    Args:
        position_ids: (B, S) int64.
        mask: (B, S), zero for padding.
    """
    index_BS = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    token_BS = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.bool()
    last_BS = index_BS.where(token_BS, -1).cummax(dim=1).values  # the last token up to here
    before_BS = torch.nn.functional.pad(last_BS[:, :-1], (1, 0), value=-1)
    follows_BS = position_ids == position_ids.gather(1, before_BS.clamp(min=0)) + 1
    document_BS = (token_BS & (before_BS >= 0) & ~follows_BS).cumsum(dim=1)
    if not torch.compiler.is_compiling() and not document_BS[:, -1].any():
        return None
    return document_BS


def packed_mask_options(document_BS: Tensor, attention_mask: Tensor | None, attention: str) -> dict[str, object]:
    """Arguments of `create_causal_mask` that keep packed documents apart where there is a mask of padding too.

    transformers looks at the positions only where there is no such mask; one of ones says nothing and is left out.

    Raises:
        ConfigError: for an attention that takes no masks, where there is padding.
    """
    if not is_padding_mask(attention_mask):
        return {}
    if not torch.compiler.is_compiling() and attention_mask.bool().all():
        return {"attention_mask": None}
    if "flash" in attention:
        raise ConfigError(f"packed documents with padding need attention 'sdpa' or 'eager', not {attention!r}")
    return {"and_mask_function": packed_sequence_mask_function(document_BS)}
