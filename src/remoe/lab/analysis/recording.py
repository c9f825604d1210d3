"""Records which experts a model uses on a text.

Legend: B sequences, S sequence length, L layers, T tokens without padding, E experts, V vocabulary.
"""

import io
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.record import About, RecordWriter, RoutingRecord
from remoe.lab.analysis.texts import Batch, Text, TokenTexts
from remoe.lab.data.batches import IGNORED_TARGET
from remoe.models.modes import evaluating
from remoe.models.packing import document_positions

BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 2048  # a larger batch is no faster there, and takes more memory
BATCH_LOGITS = 2**26  # B S V, 256 MiB of float32


def record_routing(
    mixture: Mixture,
    text: Text,
    sink: Path | BinaryIO | None = None,
    *,
    texts: TokenTexts | None = None,
    model: dict[str, Any] | None = None,
    losses: bool = True,
    document_end: int | None = None,
    autocast: torch.autocast | None = None,
) -> RoutingRecord:
    """Runs a model over a text, and records how every layer routed every token.

    Args:
        mixture: the model; it runs in evaluation mode, and its mode is restored at the end.
        text: what it reads.
        sink: where the record is written, piece by piece; in memory by default.
        texts: of the model's tokenizer, to record the text of each token; None for none.
        model: what identifies the model.
        losses: whether to record the loss of each token, which costs the logits.
        document_end: the token that ends a document, to mask the documents of a sequence from each other (ours only);
            None to leave them unmasked.
        autocast: context of the forward pass.
    """
    about = about_of(mixture, model or {}, text.identity)
    buffer = io.BytesIO()
    rows, sequences = batch_rows(mixture, text.seq_len), 0
    with RecordWriter(sink or buffer, about) as writer, evaluating(mixture.model):
        for batch in text.batches(rows):
            loss_T, active_LTE, gate_LTE = routing_of_batch(mixture, batch, losses, document_end, autocast)
            kept_T, token_BS = batch.mask_NS.flatten(), batch.input_NS
            sequence_B1 = torch.arange(sequences, sequences + len(token_BS))[:, None]
            lengths = batch.mask_NS.sum(dim=1).tolist()
            writer.append(
                sequence_T=sequence_B1.expand_as(token_BS).flatten()[kept_T],
                domains=[batch.domain] * int(kept_T.sum()),
                token_T=token_BS.flatten()[kept_T],
                loss_T=loss_T,
                active_LTE=active_LTE,
                gate_LTE=gate_LTE,
                texts=texts and [t for ids, n in zip(token_BS.tolist(), lengths, strict=True) for t in texts(ids[:n])],
            )
            sequences += len(token_BS)
    return RoutingRecord(sink if isinstance(sink, Path) else buffer.getvalue())


def about_of(mixture: Mixture, model: dict[str, Any], text: dict[str, Any]) -> About:
    """The description of a record of a model's routing; `model` and `text` identify the two."""
    return About(
        mixture.layers, mixture.experts, mixture.k, mixture.router, mixture.steered, mixture.shared_expert,
        model=model, text=text,
    )  # fmt: skip


def batch_rows(mixture: Mixture, seq_len: int) -> int:
    """How many sequences to run at a time, so that the logits fit into memory."""
    most = CPU_BATCH_TOKENS if mixture.device.type == "cpu" else BATCH_TOKENS
    return max(1, min(most, BATCH_LOGITS // mixture.vocabulary) // seq_len)


def routing_of_batch(
    mixture: Mixture,
    batch: Batch,
    losses: bool = True,
    document_end: int | None = None,
    autocast: torch.autocast | None = None,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Loss of each token, (T,) float32, NaN without a target; and each layer's pairs and gates, (T, E), on the CPU.

    The arguments are those of `record_routing`; the model is in the mode in which it is to run.
    """
    device, kept_T = mixture.device, batch.mask_NS.flatten()
    positions_BS = None if document_end is None else document_positions(batch.input_NS, document_end)
    with autocast or torch.autocast(device.type, enabled=False):
        logits_BSV, layers = mixture.run(batch.input_NS, batch.mask_NS, positions_BS, logits=losses)
    nats_T = None
    if losses:
        sequences = zip(logits_BSV, batch.target_NS, strict=True)
        nats_T = torch.cat([_nats(logits_SV, target_S) for logits_SV, target_S in sequences]).cpu()[kept_T]
    active = [one.active_TE.cpu()[kept_T] for one in layers]
    return nats_T, active, [one.gate_TE.float().cpu()[kept_T] for one in layers]


def _nats(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """(S,) float32 cross-entropy; NaN without a target."""
    target_S = target_S.to(logits_SV.device)
    nats_S = F.cross_entropy(logits_SV.float(), target_S, ignore_index=IGNORED_TARGET, reduction="none")
    return nats_S.masked_fill(target_S == IGNORED_TARGET, torch.nan)
