"""The loss of a model on validation data, overall and per domain.

Legend: N sequences, S sequence length, L layers, E experts.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from remoe.convert.relufy.model import RelufiedMixin
from remoe.lab.data import ValidationWindows
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.ranks import Ranks
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating
from remoe.models.packing import document_positions


@dataclass(frozen=True)
class Evaluation:
    """Sums over a set of tokens, and the figures that follow from them.

    Attributes:
        nats: summed cross-entropy.
        targets: predicted tokens.
        text_bytes: UTF-8 bytes of the predicted text.
        tokens: tokens that went through each layer.
        count_LE: (L, E) int64, tokens that each expert got.
    """

    nats: float
    targets: int
    text_bytes: int
    tokens: int
    count_LE: Tensor = field(compare=False)

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def loss(self) -> float:
        """Cross-entropy, nats per token."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text, which is comparable between tokenizers."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def sparsity(self) -> float:
        """S over these tokens: the share of (token, expert) pairs that were not executed."""
        return 1 - self.count_LE.sum().item() / (self.tokens * self.count_LE.numel())

    @property
    def share_LE(self) -> Tensor:
        """(L, E) float64: share of the tokens that each expert got."""
        return self.count_LE.double() / self.tokens

    def to_dict(self) -> dict[str, float]:
        """The figures by name."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "sparsity": self.sparsity,
            "tokens": self.targets,
        }


def evaluate(
    model: RemoeForCausalLM | RelufiedMixin,
    windows: ValidationWindows,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    autocast: torch.autocast | None = None,
    ranks: Ranks | None = None,
    document_end: int | None = None,
) -> dict[str, Evaluation]:
    """Evaluates a model on each domain; `total` sums the results up.

    Args:
        model: of this package or relufied; put into evaluation mode, and afterwards into the mode that it was in.
        windows: validation data; padding at the end of a domain is masked.
        batch_size: sequences per forward pass.
        max_tokens: roughly, in total; each domain contributes a prefix of whole documents, in proportion to its size.
            None for everything.
        autocast: context of the forward pass.
        ranks: processes that share the work, each of which must call this; all get the same result.
        document_end: the token that ends a document, to mask the documents of a window from each other (see
            `document_positions`); None to leave them unmasked.
    """
    ranks = Ranks(Mesh()) if ranks is None else ranks
    device = next(model.parameters()).device
    fewer = {"return_logits": False} if isinstance(model, RemoeForCausalLM) else {}
    results = {}
    with evaluating(model):
        for domain, limit in windows.shares(max_tokens).items():
            nats = torch.zeros((), dtype=torch.float64, device=device)
            counted = torch.zeros(2, dtype=torch.int64, device=device)  # read once: reading is a host sync
            count_LE: Tensor = torch.zeros((), dtype=torch.int64, device=device)
            for (input_NS, target_NS, mask_NS), counts in ranks.deal(windows.batches(domain, batch_size, limit)):
                input_NS, target_NS = input_NS.to(device), target_NS.to(device)
                positions_NS = None if document_end is None else document_positions(input_NS, document_end)
                with autocast or torch.autocast(device.type, enabled=False):
                    out = model(
                        input_NS,
                        attention_mask=mask_NS.to(device),
                        position_ids=positions_NS,
                        labels=target_NS,  # for models of transformers, which take shifted ones beside them
                        shift_labels=target_NS,
                        num_items_in_batch=1,  # the sum, not the mean
                        use_cache=False,
                        **fewer,
                    )
                nats += out.lm_loss.double() * counts
                counted[0] += (target_NS != -100).sum() * counts
                counted[1] += out.routings[0].num_tokens.to(device) * counts
                count_LE = count_LE + torch.stack([routing.count_E.to(device) for routing in out.routings]) * counts
            nats, counted, count_LE = ranks.sum(nats), ranks.sum(counted), ranks.sum(count_LE)
            targets, tokens = counted.tolist()
            results[domain] = Evaluation(nats.item(), targets, windows.bytes(domain, limit), tokens, count_LE.cpu())
    return results


def total(results: dict[str, Evaluation]) -> Evaluation:
    """All domains together: each token has the same weight."""
    return sum(results.values(), Evaluation(0.0, 0, 0, 0, torch.tensor(0)))


def validation_record(results: dict[str, Evaluation]) -> dict[str, object]:
    """The validation fields of a record in metrics.jsonl."""
    overall = total(results)
    return {
        "validation_loss": overall.loss,
        "validation_sparsity": overall.sparsity,
        "validation_loss_per_domain": {domain: result.loss for domain, result in results.items()},
    }
