"""The routing of single batches of a model of this package, or of a relufied one.

Legend: B sequences, S sequence length, L layers, T tokens without padding, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe.routing import Routing
from remoe.routing.replay import executed_pairs


@torch.no_grad()
def active_of(
    model: PreTrainedModel, input_BS: Tensor, mask_BS: Tensor, autocast: torch.autocast | None = None
) -> Tensor:
    """(L, T, E) bool, on the CPU: the pairs that the model executes for the tokens of some sequences.

    Args:
        model: in the mode, training or evaluation, whose routing is to be returned.
        input_BS: (B, S) int64, token ids.
        mask_BS: (B, S) bool, false for padding, which is left out of T.
        autocast: context of the forward pass.
    """
    routings = _routings(model, input_BS, mask_BS, autocast)
    kept_T = mask_BS.flatten().to(routings[0].gate_TE.device)
    return torch.stack([executed_pairs(routing)[kept_T] for routing in routings]).cpu()


@torch.no_grad()
def gates_of(model: PreTrainedModel, input_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(L, T, E) float32, on the CPU: the gates, zero for pairs that are not executed; arguments as in `active_of`."""
    routings = _routings(model, input_BS, mask_BS, None)
    kept_T = mask_BS.flatten().to(routings[0].gate_TE.device)
    return torch.stack([routing.gate_TE for routing in routings])[:, kept_T].float().cpu()


def _routings(
    model: PreTrainedModel, input_BS: Tensor, mask_BS: Tensor, autocast: torch.autocast | None
) -> Sequence[Routing]:
    device = next(model.parameters()).device
    with autocast or torch.autocast(device.type, enabled=False):
        # Logits of one position, the fewest that the model can return.
        out = model(input_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False, logits_to_keep=1)
    return out.routings
