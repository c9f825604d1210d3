"""Which experts a model uses on validation data, collected in one run for any number of measures.

Legend: B sequences, S sequence length, L layers, T tokens without padding, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remoe.lab.data import ValidationWindows
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating
from remoe.routing import Routing


@dataclass(frozen=True)
class RoutingRecord:
    """The routing of many tokens, one domain after the other; all tensors are on the CPU.

    The tokens of a window are consecutive rows in the order of the text, so that a token's position is its distance
    from the first row of its window.

    Attributes:
        active_LTE: (L, T, E) bool, the executed pairs.
        token_T: (T,) int64, token ids.
        domain_T: (T,) int64, index into `domains`.
        sequence_T: (T,) int64, number of the window that the token belongs to, counted over all domains.
        domains: names of the domains.
    """

    active_LTE: Tensor
    token_T: Tensor
    domain_T: Tensor
    sequence_T: Tensor
    domains: tuple[str, ...]


def collect(
    model: RemoeForCausalLM,
    windows: ValidationWindows,
    max_tokens: int | None,
    batch_size: int,
    *,
    autocast: torch.autocast | None = None,
) -> RoutingRecord:
    """Runs the model over the windows, and records how every layer routed every token.

    Args:
        model: runs in eval mode; its mode is restored at the end.
        windows: validation data; padding at the end of a domain is left out.
        max_tokens: approximate total, divided among the domains by size; each contributes a prefix of whole documents.
            None means everything.
        batch_size: sequences per forward pass.
        autocast: context of the forward pass.
    """
    columns: dict[str, list[Tensor]] = {"active": [], "token": [], "domain": [], "sequence": []}
    num_sequences = 0
    with evaluating(model):
        for index, (domain, limit) in enumerate(windows.shares(max_tokens).items()):
            for input_BS, _, mask_BS in windows.batches(domain, batch_size, limit):
                kept_T = mask_BS.flatten()
                columns["active"].append(active_of(model, input_BS, mask_BS, autocast))
                columns["token"].append(input_BS.flatten()[kept_T])
                columns["domain"].append(torch.full_like(columns["token"][-1], index))
                sequence_B1 = torch.arange(num_sequences, num_sequences + len(input_BS))[:, None]
                columns["sequence"].append(sequence_B1.expand_as(input_BS).flatten()[kept_T])
                num_sequences += len(input_BS)
    return RoutingRecord(
        torch.cat(columns["active"], dim=1),
        torch.cat(columns["token"]),
        torch.cat(columns["domain"]),
        torch.cat(columns["sequence"]),
        windows.domains,
    )


@torch.no_grad()
def active_of(
    model: RemoeForCausalLM, input_BS: Tensor, mask_BS: Tensor, autocast: torch.autocast | None = None
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
    return torch.stack([_executed(routing)[kept_T] for routing in routings]).cpu()


@torch.no_grad()
def gates_of(model: RemoeForCausalLM, input_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """(L, T, E) float32, on the CPU: the gates, zero for pairs that are not executed; arguments as in `active_of`."""
    routings = _routings(model, input_BS, mask_BS, None)
    kept_T = mask_BS.flatten().to(routings[0].gate_TE.device)
    return torch.stack([routing.gate_TE for routing in routings])[:, kept_T].float().cpu()


def _routings(
    model: RemoeForCausalLM, input_BS: Tensor, mask_BS: Tensor, autocast: torch.autocast | None
) -> Sequence[Routing]:
    device = next(model.parameters()).device
    with autocast or torch.autocast(device.type, enabled=False):
        # Logits of one position, the fewest that the model can return.
        out = model(input_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False, logits_to_keep=1)
    return out.routings


def _executed(routing: Routing) -> Tensor:
    """(T, E) bool; not simply the nonzero gates, because a softmax may round a gate to zero."""
    pairs = routing.assignment
    if pairs.pair_TE is not None:
        return pairs.pair_TE >= 0
    listed_N = torch.arange(len(pairs.token_N), device=pairs.token_N.device) < pairs.count_E.sum()
    active_TE = torch.zeros_like(routing.gate_TE, dtype=torch.bool)
    active_TE[pairs.token_N[listed_N], pairs.expert_N[listed_N]] = True
    return active_TE
