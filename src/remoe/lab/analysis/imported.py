"""Records of routing from the files of other programs.

vLLM and SGLang return the routed experts of a request as an array (tokens, layers, top_k); `numpy.save` and
`numpy.savez` keep them. Megatron-LM writes a trace, `--moe-routing-trace-path`, of one JSON object per rank, step and
layer. Neither has gates, losses or texts.

Legend: L layers, T tokens, E experts, K experts per token.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remoe.errors import ConfigError, DataError
from remoe.lab.analysis.record import About, RecordWriter, RoutingRecord

ARRAYS, TRACE = (".npy", ".npz"), ".jsonl"
PIECE = 4096  # tokens that are written at a time
IDS = "token_ids"  # of an .npz, beside its one array of experts


def is_import(path: str | Path) -> bool:
    """Whether a path is a file of another program, by its name."""
    return Path(path).is_file() and Path(path).suffix in (*ARRAYS, TRACE)


def import_routing(paths: list[Path], sink: Path, num_experts: int) -> RoutingRecord:
    """Writes a record of what other programs recorded.

    Args:
        paths: arrays (T, L, K), each of them one sequence; or traces, of which no two tokens count as neighbours.
        sink: file to write.
        num_experts: E, which the files do not tell.

    Raises:
        ConfigError: for an expert that there is not.
        DataError: for a file that cannot be read or holds something else.
    """
    kinds = {path.suffix == TRACE for path in paths}
    if len(kinds) > 1:
        raise ConfigError("arrays and traces cannot be in one record")
    pieces = _traces(paths) if kinds.pop() else _arrays(paths)
    first = next(pieces, None)
    if first is None:
        raise DataError(f"{paths[0]}: no routed token in it")
    _, L, K = first.experts_TLK.shape
    about = About(L, num_experts, K, "topk", gates=False, text={"imported": [str(path) for path in paths]})
    with RecordWriter(sink, about) as writer:
        _write(writer, first)
        for piece in pieces:
            if piece.experts_TLK.shape[1:] != (L, K):
                found, expected = tuple(piece.experts_TLK.shape[1:]), (L, K)
                raise DataError(f"{piece.place}: (layers, experts per token) is {found}, but {expected} before it")
            _write(writer, piece)
    return RoutingRecord(sink)


class _Piece:
    """Some tokens of a file: their experts (T, L, K), sequences (T,), and token ids (T,) if they are known."""

    def __init__(self, place: str, domain: str, experts_TLK: Any, sequence_T: Tensor, token_T: Tensor | None) -> None:
        self.place, self.domain, self.sequence_T, self.token_T = place, domain, sequence_T, token_T
        experts_TLK = np.asarray(experts_TLK)
        if experts_TLK.ndim != 3 or experts_TLK.dtype.kind not in "iu":
            raise DataError(f"{place}: not whole numbers of shape (tokens, layers, experts per token)")
        self.experts_TLK = torch.from_numpy(experts_TLK.astype(np.int64))


def _write(writer: RecordWriter, piece: _Piece) -> None:
    (T, L, _), E = piece.experts_TLK.shape, writer.about.experts
    wrong = piece.experts_TLK[(piece.experts_TLK < 0) | (piece.experts_TLK >= E)]
    if len(wrong):
        raise ConfigError(f"{piece.place}: expert {wrong[0].item()} is not one of {E} (--num-experts)")
    active_LTE = torch.zeros(L, T, E, dtype=torch.bool).scatter(2, piece.experts_TLK.transpose(0, 1), True)
    writer.append(
        sequence_T=piece.sequence_T,
        domains=[piece.domain] * T,
        active_LTE=list(active_LTE),
        token_T=piece.token_T,
    )


def _arrays(paths: list[Path]) -> Iterator[_Piece]:
    for sequence, path in enumerate(paths):
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
            arrays = dict(loaded) if path.suffix == ".npz" else {"experts": loaded}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error
        ids = arrays.pop(IDS, None)
        if len(arrays) != 1:
            raise DataError(f"{path}: must hold one array of experts, and {IDS} if you like, but has {[*arrays]}")
        (experts_TLK,) = arrays.values()
        if experts_TLK.ndim != 3 or experts_TLK.dtype.kind not in "iu":
            raise DataError(f"{path}: not whole numbers of shape (tokens, layers, experts per token)")
        if ids is not None and ids.shape != experts_TLK.shape[:1]:
            raise DataError(f"{path}: {IDS} has shape {ids.shape}, but there are {len(experts_TLK)} tokens")
        for start in range(0, len(experts_TLK), PIECE):
            part = experts_TLK[start : start + PIECE]
            token_T = None if ids is None else torch.from_numpy(ids[start : start + PIECE].astype(np.int64))
            yield _Piece(str(path), path.stem, part, torch.full((len(part),), sequence), token_T)


def _traces(paths: list[Path]) -> Iterator[_Piece]:
    """The tokens of one rank and step at a time; a layer that occurs again begins the next micro-batch."""
    tokens = 0
    for path in paths:
        layers: dict[int, list[list[int]]] = {}
        key, number = None, 0
        for number, line in enumerate(_lines(path), start=1):
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
                layer, experts, at = record["layer"], record["top_indices"], (record["rank"], record["step"])
                layer = int(layer[-1] if isinstance(layer, list) else layer)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{place}: not a line of a routing trace: {error!r}") from error
            if layers and (at != key or layer in layers):
                piece = _step(layers, f"{place}, and those before it", path.stem, tokens)
                tokens += len(piece.sequence_T)
                yield piece
                layers = {}
            key, layers[layer] = at, experts
        if layers:
            piece = _step(layers, f"{path}, line {number}", path.stem, tokens)
            tokens += len(piece.sequence_T)
            yield piece


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from (line for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _step(layers: dict[int, list[list[int]]], place: str, domain: str, tokens: int) -> _Piece:
    try:
        experts_TLK = np.stack([np.asarray(layers[layer]) for layer in sorted(layers)], axis=1)
    except ValueError as error:
        raise DataError(f"{place}: the layers of a step have different numbers of tokens or experts") from error
    return _Piece(place, domain, experts_TLK, torch.arange(tokens, tokens + len(experts_TLK)), None)
