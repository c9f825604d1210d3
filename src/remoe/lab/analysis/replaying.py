"""Makes a record of routing into one that a model can replay.

Legend: B sequences, S sequence length, L layers, T = B S tokens, E experts.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from remoe.errors import ConfigError, check
from remoe.lab.analysis.record import UNKNOWN, RoutingRecord
from remoe.routing.replay import Replay

_Sequence = tuple[Tensor, Tensor, Tensor | None]  # ids, pairs and gates


def replay_of_record(
    record: RoutingRecord,
    seq_len: int,
    sequences: slice | None = None,
    *,
    keep_gates: bool = False,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Replay, Tensor]:
    """Sequences of a record as a batch.

    Each sequence of the record is a row of the batch, in their order. A row may be longer, on either side: its other
    tokens are tokens without a record, which the model's router routes itself, such as padding and the last sampled
    token of a request of vLLM.

    Args:
        record: of the same layers and experts as the model.
        seq_len: S of the batch, at least that of each of the sequences.
        sequences: which of the record's, by their order in it, with bounds from zero; all by default.
        keep_gates: whether to replay the recorded gates too.
        input_ids: (B, S) int64, the batch, with which the recorded ids are compared.
        attention_mask: (B, S), zero for padding: the record's tokens are those of a row that are no padding, in their
            order. By default a sequence starts at the first column of its row.

    Returns:
        The replay, and the recorded ids of the tokens, (B, S) int64, -1 where there is none.

    Raises:
        ConfigError: for gates that the record does not have, a sequence longer than S or than its row, no sequence, a
            slice with a negative bound, a batch of another shape, or another token than the recorded one.
        DataError: for a damaged record.
    """
    if keep_gates and not record.about.gates:
        raise ConfigError(f"{record.name} has no gates: replay it with gates computed anew")
    found = list(_chosen(_sequences(record, keep_gates), sequences))
    if not found:
        raise ConfigError(f"{record.name} has no such sequences")
    longest = max(len(token_S) for token_S, *_ in found)
    if longest > seq_len:
        raise ConfigError(f"{record.name} has a sequence of {longest} tokens, but the batch has room for {seq_len}")
    B, L, E = len(found), record.about.layers, record.about.experts
    for name, given in {"input_ids": input_ids, "attention_mask": attention_mask}.items():
        shape = (B, seq_len) if given is None else tuple(given.shape)
        check(shape == (B, seq_len), f"{name} must be {(B, seq_len)}, a row for each sequence, but is {shape}")
    token_BS = torch.full((B, seq_len), UNKNOWN)
    known_BS = torch.zeros(B, seq_len, dtype=torch.bool)
    active_LBSE = torch.zeros(L, B, seq_len, E, dtype=torch.bool)
    gate_LBSE = torch.zeros(L, B, seq_len, E) if keep_gates else None
    for row, (token_S, active_LSE, gate_LSE) in enumerate(found):
        kept_S = torch.arange(seq_len) if attention_mask is None else attention_mask[row].cpu().nonzero().flatten()
        if len(token_S) > len(kept_S):
            raise ConfigError(
                f"row {row} of the batch has {len(kept_S)} tokens, but its sequence in {record.name} has {len(token_S)}"
            )
        place_S = kept_S[: len(token_S)]
        token_BS[row, place_S], known_BS[row, place_S] = token_S, True
        active_LBSE[:, row, place_S] = active_LSE
        if gate_LBSE is not None:
            gate_LBSE[:, row, place_S] = gate_LSE
    if input_ids is not None:
        _check_tokens(record, token_BS, input_ids.cpu())
    gates = None if gate_LBSE is None else list(gate_LBSE.flatten(1, 2))
    return Replay(list(active_LBSE.flatten(1, 2)), gates, known_BS.flatten()), token_BS


def _chosen(sequences: Iterator[_Sequence], chosen: slice | None) -> Iterator[_Sequence]:
    chosen = chosen or slice(None)
    try:
        return itertools.islice(sequences, chosen.start, chosen.stop, chosen.step)
    except ValueError:
        raise ConfigError(f"the bounds of {chosen} must not be negative, and its step at least 1") from None


def _check_tokens(record: RoutingRecord, token_BS: Tensor, input_BS: Tensor) -> None:
    different = ((token_BS != UNKNOWN) & (token_BS != input_BS)).nonzero()
    if len(different):
        row, column = different[0].tolist()
        raise ConfigError(
            f"row {row}, column {column}: the batch has token {input_BS[row, column]}, but {record.name} has "
            f"{token_BS[row, column]} there ({len(different)} tokens differ)"
        )


def _sequences(record: RoutingRecord, gates: bool) -> Iterator[_Sequence]:
    """Ids, pairs and gates of each sequence."""
    for block in record.blocks(gates=gates):
        _, lengths = block.sequence_T.unique_consecutive(return_counts=True)
        start = 0
        for length in lengths.tolist():
            rows = slice(start, start + length)
            gate_LSE = None if block.gate_LTE is None else block.gate_LTE[:, rows]
            yield block.token_T[rows], block.active_LTE[:, rows], gate_LSE
            start += length
