"""Which experts a model uses on validation data: run once, measured often.

Legend: B sequences, S sequence length, L layers, T tokens without padding, E experts.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from remoe.data import ValidationWindows
from remoe.errors import DataError
from remoe.models.modeling_remoe import RemoeForCausalLM

FORMAT = "remoe-routing"
# One key, because safetensors writes several in an order that changes from run to run.
METADATA_KEY = "remoe"


@dataclass(frozen=True)
class RoutingRecord:
    """The routing of a run of tokens, domain after domain; all on the CPU.

    A window's tokens are consecutive rows in the order of the text, so that a token's position is its distance from
    its window's first row.

    Attributes:
        active_LTE: (L, T, E) bool, the pairs with a gate that is not zero.
        gate_LTE: (L, T, E) float32 gates, zero elsewhere; None where only the choice was kept.
        token_T: (T,) int64, token ids.
        domain_T: (T,) int64, index into `domains`.
        sequence_T: (T,) int64, the window that the token belongs to, counted over all domains.
        domains: their names.
    """

    active_LTE: Tensor
    gate_LTE: Tensor | None
    token_T: Tensor
    domain_T: Tensor
    sequence_T: Tensor
    domains: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Writes a safetensors file; domains are JSON in its metadata."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        metadata = json.dumps({"format": FORMAT, "version": 1, "domains": self.domains})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {METADATA_KEY: metadata})

    @classmethod
    def load(cls, path: Path) -> "RoutingRecord":
        """Reads what `save` wrote.

        Raises:
            DataError: when the file is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                if header.get("format") != FORMAT:
                    raise DataError(f"{path} is no record of routing")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        return cls(**{"gate_LTE": None, **tensors}, domains=tuple(header["domains"]))


@torch.no_grad()
def collect(
    model: RemoeForCausalLM,
    windows: ValidationWindows,
    max_tokens: int | None,
    batch_size: int,
    *,
    gates: bool = False,
    autocast: torch.autocast | None = None,
) -> RoutingRecord:
    """Runs the model over the windows and keeps how every layer routed every token.

    Args:
        model: put into eval mode for the time, then back.
        windows: validation data; padding at the end of a domain is left out.
        max_tokens: in all, about; each domain gives a prefix of whole documents by its share. None for everything.
        batch_size: sequences per forward pass.
        gates: whether to keep the gates too, which takes five times the memory.
        autocast: context of the forward pass.
    """
    was_training = model.training
    model.eval()
    size = {domain: windows.num_predictions(domain) for domain in windows.domains}
    columns: dict[str, list[Tensor]] = {"active": [], "gate": [], "token": [], "domain": [], "sequence": []}
    num_sequences = 0
    for index, domain in enumerate(windows.domains):
        limit = None if max_tokens is None else max(1, max_tokens * size[domain] // sum(size.values()))
        for input_BS, _, mask_BS in windows.batches(domain, batch_size, limit):
            kept_T = mask_BS.flatten()
            gate_LTE = gates_of(model, input_BS, mask_BS, autocast)
            columns["active"].append(gate_LTE != 0)
            if gates:
                columns["gate"].append(gate_LTE)
            columns["token"].append(input_BS.flatten()[kept_T])
            columns["domain"].append(torch.full_like(columns["token"][-1], index))
            sequence_B1 = torch.arange(num_sequences, num_sequences + len(input_BS))[:, None]
            columns["sequence"].append(sequence_B1.expand_as(input_BS).flatten()[kept_T])
            num_sequences += len(input_BS)
    model.train(was_training)
    return RoutingRecord(
        torch.cat(columns["active"], dim=1),
        torch.cat(columns["gate"], dim=1) if gates else None,
        torch.cat(columns["token"]),
        torch.cat(columns["domain"]),
        torch.cat(columns["sequence"]),
        windows.domains,
    )


@torch.no_grad()
def gates_of(
    model: RemoeForCausalLM, input_BS: Tensor, mask_BS: Tensor, autocast: torch.autocast | None = None
) -> Tensor:
    """(L, T, E) float32, on the CPU: the gates of some sequences' tokens, zero for pairs that are not active.

    Args:
        model: in the mode, training or evaluation, whose routing is wanted.
        input_BS: (B, S) int64, token ids.
        mask_BS: (B, S) bool, false for padding, which is left out.
        autocast: context of the forward pass.
    """
    device = next(model.parameters()).device
    with autocast or torch.autocast(device.type, enabled=False):
        # One position's logits, because there is no asking for none.
        out = model(input_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False, logits_to_keep=1)
    kept_T = mask_BS.flatten().to(device)
    return torch.stack([routing.gate_TE for routing in out.routings])[:, kept_T].float().cpu()
