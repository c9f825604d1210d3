"""Makes a record of routing into one that a model can replay.

Legend: B sequences, S sequence length, L layers, T = B S tokens, E experts.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from remoe.errors import ConfigError
from remoe.lab.analysis.record import UNKNOWN, RoutingRecord
from remoe.routing.replay import Replay


def replay_of_record(
    record: RoutingRecord, seq_len: int, sequences: slice | None = None, *, keep_gates: bool = False
) -> tuple[Replay, Tensor]:
    """Sequences of a record as a batch.

    A sequence starts at the first column of its row. Shorter ones are filled up with tokens without a record, which the
    model's router routes itself, such as the last sampled token of a request of vLLM.

    Args:
        record: of the same layers and experts as the model.
        seq_len: S of the batch, at least that of each of the sequences.
        sequences: which of the record's, by their order in it; all by default.
        keep_gates: whether to replay the recorded gates too.

    Returns:
        The replay, and the recorded ids of the tokens, (B, S) int64, -1 where there is none.

    Raises:
        ConfigError: for gates that the record does not have, a sequence longer than S, or no sequence.
        DataError: for a damaged record.
    """
    if keep_gates and not record.about.gates:
        raise ConfigError(f"{record.name} has no gates: replay it with gates computed anew")
    chosen = sequences or slice(None)
    found = list(itertools.islice(_sequences(record, keep_gates), chosen.start, chosen.stop, chosen.step))
    if not found:
        raise ConfigError(f"{record.name} has no such sequences")
    longest = max(len(token_S) for token_S, *_ in found)
    if longest > seq_len:
        raise ConfigError(f"{record.name} has a sequence of {longest} tokens, but the batch has room for {seq_len}")
    L, E = record.about.layers, record.about.experts
    token_BS = torch.full((len(found), seq_len), UNKNOWN)
    known_BS = torch.zeros(len(found), seq_len, dtype=torch.bool)
    active_LBSE = torch.zeros(L, len(found), seq_len, E, dtype=torch.bool)
    gate_LBSE = torch.zeros(L, len(found), seq_len, E) if keep_gates else None
    for row, (token_S, active_LSE, gate_LSE) in enumerate(found):
        length = len(token_S)
        token_BS[row, :length], known_BS[row, :length] = token_S, True
        active_LBSE[:, row, :length] = active_LSE
        if gate_LBSE is not None:
            gate_LBSE[:, row, :length] = gate_LSE
    gates = None if gate_LBSE is None else list(gate_LBSE.flatten(1, 2))
    return Replay(list(active_LBSE.flatten(1, 2)), gates, known_BS.flatten()), token_BS


def _sequences(record: RoutingRecord, gates: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Ids, pairs and gates of each sequence."""
    for block in record.blocks(gates=gates):
        _, lengths = block.sequence_T.unique_consecutive(return_counts=True)
        start = 0
        for length in lengths.tolist():
            rows = slice(start, start + length)
            gate_LSE = None if block.gate_LTE is None else block.gate_LTE[:, rows]
            yield block.token_T[rows], block.active_LTE[:, rows], gate_LSE
            start += length
