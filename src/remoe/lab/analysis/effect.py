"""What each expert does to the loss: measured by switching it off.

Legend: N sequences, S sequence length, L layers, E experts, C domains.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remoe.errors import check
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.recording import batch_rows, routing_of_batch
from remoe.lab.analysis.texts import Batch, Text
from remoe.models.modes import evaluating


@dataclass(frozen=True)
class Effects:
    """How the loss rises when one expert is switched off and all gates of the others stay as they are.

    Attributes:
        domains: (C,) names.
        tokens_C: (C,) int64, predicted tokens.
        loss_C: (C,) float64, loss of the whole model in nats per token.
        effect_CLE: (C, L, E) float64, loss without the expert minus loss with it, in nats per token of the domain.
    """

    domains: list[str]
    tokens_C: Tensor
    loss_C: Tensor
    effect_CLE: Tensor

    @property
    def effect_LE(self) -> Tensor:
        """(L, E) float64: the same over all tokens."""
        weight_C = self.tokens_C.double() / self.tokens_C.sum()
        return (self.effect_CLE * weight_C[:, None, None]).sum(dim=0)


def expert_effects(
    mixture: Mixture, text: Text, domains: Sequence[str], max_tokens: int, *, document_end: int | None = None
) -> Effects:
    """Measures the effect of every expert: a forward pass for each expert that has a token.

    Args:
        mixture: the model; it runs in evaluation mode.
        text: what it reads.
        domains: (C,) of the text; each gives its first sequences.
        max_tokens: of all domains together, divided equally; at least one sequence of each is read.
        document_end: as in `record_routing`.

    Raises:
        ConfigError: when no token's loss is known. A domain without one is left out.
    """
    C, share = len(domains), max_tokens // len(domains)
    rows = max(1, min(batch_rows(mixture, text.seq_len), share // text.seq_len))
    batches = first_batches(text, rows, domains, share)
    tokens_C = torch.zeros(C, dtype=torch.int64)
    nats_C = torch.zeros(C, dtype=torch.float64)
    effect_CLE = torch.zeros(C, mixture.layers, mixture.experts, dtype=torch.float64)
    with evaluating(mixture.model):
        for batch in batches:
            loss_T, active_LTE, _ = routing_of_batch(mixture, batch, document_end=document_end)
            domain, nats = domains.index(batch.domain), loss_T.double().nansum()
            tokens_C[domain] += (~loss_T.isnan()).sum()
            nats_C[domain] += nats
            for layer, active_TE in enumerate(active_LTE):
                for expert in active_TE.any(dim=0).nonzero().flatten().tolist():  # the others have no effect
                    with mixture.without(layer, expert):
                        without_T, *_ = routing_of_batch(mixture, batch, document_end=document_end)
                    effect_CLE[domain, layer, expert] += without_T.double().nansum() - nats
    read_C = tokens_C > 0  # a domain of single tokens has none whose loss is known
    check(bool(read_C.any()), "the effect of experts needs a text of two tokens or more")
    tokens_C, read = tokens_C[read_C], [name for name, is_read in zip(domains, read_C.tolist(), strict=True) if is_read]
    return Effects(read, tokens_C, nats_C[read_C] / tokens_C, effect_CLE[read_C] / tokens_C[:, None, None])


def first_batches(text: Text, rows: int, domains: Sequence[str], share: int) -> list[Batch]:
    """The first batches of each domain, until it has `share` tokens."""
    found, taken = [], Counter(dict.fromkeys(domains, 0))
    for batch in text.batches(rows):
        if taken[batch.domain] == 0 or taken[batch.domain] + int(batch.mask_NS.sum()) <= share:
            found.append(batch)
            taken[batch.domain] += int(batch.mask_NS.sum())
        elif all(taken.values()) and batch.domain == domains[-1]:
            break
    return found
