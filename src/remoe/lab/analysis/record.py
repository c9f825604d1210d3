"""The record of routing: which experts ran each token, with which gates, in one Parquet file.

docs/record.md describes the columns. A record is written and read in pieces, so that the memory does not grow with the
number of tokens.

Legend: L layers, T tokens, E experts, P executed pairs of one layer.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import remoe
from remoe.errors import DataError

FORMAT, VERSION = "remoe-routing", 1
KEY = b"remoe"  # of the description in the file's metadata
UNKNOWN = -1  # a token's id in a `Block`
GROUP_ROWS, GROUP_BYTES = 1 << 16, 1 << 26  # a row group is written when it has so much
BLOCK_TRIPLES, BLOCK_ROWS = 1 << 26, 1 << 16  # (layer, token, expert) triples and tokens that are read at a time


@dataclass(frozen=True)
class About:
    """What a record is a record of.

    Attributes:
        layers, experts: L and E.
        k: target number of active experts per token, exact or on average.
        router: its name.
        steered: whether lambda steers the number of active experts.
        shared_expert: whether every token also runs an expert that is not routed; None if unknown.
        gates: whether the gates are known.
        model, text: what identifies the two, such as paths and hashes.
        domains: names of the domains, in the order of their numbers in a `Block`.
        tokens: T.
        tokens_sha256: hash of the token ids, as little-endian int32; empty if they are unknown.
    """

    layers: int
    experts: int
    k: int
    router: str
    steered: bool = False
    shared_expert: bool | None = None
    gates: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    domains: list[str] = field(default_factory=list)
    tokens: int = 0
    tokens_sha256: str = ""


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of a record, and the routing of some of its layers.

    Attributes:
        sequence_T: (T,) int64, the sequence of each token; tokens of a sequence are consecutive, in their order.
        domain_T: (T,) int64, index into the record's domains.
        token_T: (T,) int64, token ids; -1 if unknown.
        loss_T: (T,) float32, cross-entropy of the next token in nats; NaN if there is none or it is unknown.
        active_LTE: (L, T, E) bool, the executed pairs.
        gate_LTE: (L, T, E) float32, their gates, zero elsewhere; None if unknown or not read.
        texts: what each token adds to the text; None if unknown or not read.
    """

    sequence_T: Tensor
    domain_T: Tensor
    token_T: Tensor
    loss_T: Tensor
    active_LTE: Tensor
    gate_LTE: Tensor | None = None
    texts: list[str] | None = None


def schema_of(about: About) -> pa.Schema:
    """The columns of a record."""
    columns = [
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("token", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("loss", pa.float32()),
    ]
    for layer in range(about.layers):
        columns.append(pa.field(f"experts_{layer}", pa.list_(pa.uint16()), nullable=False))
        if about.gates:
            columns.append(pa.field(f"gates_{layer}", pa.list_(pa.float32()), nullable=False))
    return pa.schema(columns)


class RecordWriter(AbstractContextManager):
    """Writes a record; blocks of whole or partial sequences are appended in their order.

    Args:
        sink: a path, or an open binary file.
        about: of the record; its `domains`, `tokens` and `tokens_sha256` are found out while writing.
    """

    def __init__(self, sink: Path | BinaryIO, about: About) -> None:
        self.about = about
        self.schema = schema_of(about)
        self.writer = pq.ParquetWriter(sink, self.schema, compression="zstd")
        self.domains: dict[str, None] = dict.fromkeys(about.domains)
        self.hash, self.tokens, self.known = hashlib.sha256(), 0, True
        self._begin()

    def append(
        self,
        *,
        sequence_T: Tensor,
        domains: Sequence[str],
        active_LTE: Sequence[Tensor],
        gate_LTE: Sequence[Tensor] | None = None,
        token_T: Tensor | None = None,
        loss_T: Tensor | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Appends rows.

        Args:
            sequence_T: (T,) int64.
            domains: (T,) names.
            active_LTE: for each layer (T, E) bool.
            gate_LTE: for each layer (T, E) float32; of a pair that is not executed it does not matter.
            token_T: (T,) int64, or None if unknown.
            loss_T: (T,) float32, NaN where unknown.
            texts: (T,) texts.
        """
        rows = len(sequence_T)
        self.domains.update(dict.fromkeys(domains))
        self.tokens += rows
        if token_T is None:
            self.known = False
        else:
            self.hash.update(token_T.numpy().astype("<i4").tobytes())
        columns = {
            "sequence": pa.array(sequence_T.numpy()),
            "domain": pa.array(domains, pa.string()),
            "token": pa.nulls(rows, pa.int32()) if token_T is None else pa.array(token_T.numpy().astype(np.int32)),
            "text": pa.nulls(rows, pa.string()) if texts is None else pa.array(texts, pa.string()),
            "loss": pa.nulls(rows, pa.float32()) if loss_T is None else pa.array(loss_T.numpy(), from_pandas=True),
        }
        for layer, active_TE in enumerate(active_LTE):
            starts = pa.array(np.concatenate([[0], active_TE.sum(dim=1).cumsum(0).numpy()]).astype(np.int32))
            expert_P = active_TE.nonzero()[:, 1].numpy().astype(np.uint16)
            columns[f"experts_{layer}"] = pa.ListArray.from_arrays(starts, pa.array(expert_P))
            if self.about.gates:
                gate_P = gate_LTE[layer][active_TE].float().numpy()
                columns[f"gates_{layer}"] = pa.ListArray.from_arrays(starts, pa.array(gate_P))
        self.stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=self.schema))
        self.pending += rows
        if self.pending >= GROUP_ROWS or self.group.tell() >= GROUP_BYTES:
            self._flush()

    def _begin(self) -> None:
        # The rows of a group wait in one growing block of Arrow's own allocator. Separate columns, which share memory
        # with the tensors, would lie between the large blocks of a forward pass and hinder the next in reusing them.
        self.group, self.pending = pa.BufferOutputStream(), 0
        self.stream = pa.ipc.new_stream(self.group, self.schema)

    def _flush(self) -> None:
        self.stream.close()
        if self.pending:
            table = pa.ipc.open_stream(self.group.getvalue()).read_all()
            self.writer.write_table(table, row_group_size=len(table))
        self._begin()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
            found = {"domains": [*self.domains], "tokens": self.tokens}
            found["tokens_sha256"] = self.hash.hexdigest() if self.known else ""
            described = {"format": FORMAT, "version": VERSION, "remoe": remoe.__version__} | asdict(self.about) | found
            self.writer.add_key_value_metadata({KEY: json.dumps(described)})
        self.writer.close()


class RoutingRecord:
    """A record in a file, or in memory.

    Args:
        source: path of the file, or its bytes.

    Raises:
        DataError: for a file that cannot be read or is no record.
    """

    def __init__(self, source: Path | bytes) -> None:
        self.path = source if isinstance(source, Path) else None
        self.name = str(self.path or "record")
        try:
            self.file = pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.name}: cannot be read: {' '.join(str(error).split())[:300]}") from error
        self.about = self._described()
        missing = set(schema_of(self.about).names) - set(self.file.schema_arrow.names)
        if missing:
            raise DataError(f"{self.name}: columns are missing: {', '.join(sorted(missing))}")

    def _described(self) -> About:
        try:
            described = json.loads((self.file.schema_arrow.metadata or self.file.metadata.metadata or {})[KEY])
            if described.pop("format") != FORMAT:
                raise KeyError(KEY)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise DataError(f"{self.name}: not a record of routing that `remoe record` writes") from None
        if described.get("version") != VERSION:
            raise DataError(f"{self.name}: a record of version {described.get('version')}, but only {VERSION} is known")
        try:
            return About(**{one.name: described[one.name] for one in fields(About)})
        except KeyError as error:
            raise DataError(f"{self.name}: the record's description lacks {error}") from None

    @classmethod
    def of(
        cls,
        active_LTE: Tensor,
        token_T: Tensor,
        domain_T: Tensor,
        sequence_T: Tensor,
        domains: Sequence[str],
        *,
        k: int = 1,
        gate_LTE: Tensor | None = None,
        loss_T: Tensor | None = None,
        texts: Sequence[str] | None = None,
    ) -> "RoutingRecord":
        """A record in memory from tensors as those of a `Block`."""
        L, _, E = active_LTE.shape
        about = About(L, E, k, "given", gates=gate_LTE is not None, domains=list(domains))
        sink = io.BytesIO()
        with RecordWriter(sink, about) as writer:
            writer.append(
                sequence_T=sequence_T,
                domains=[domains[i] for i in domain_T.tolist()],
                active_LTE=list(active_LTE),
                gate_LTE=None if gate_LTE is None else list(gate_LTE),
                token_T=token_T,
                loss_T=loss_T,
                texts=texts,
            )
        return cls(sink.getvalue())

    def blocks(
        self, layers: Sequence[int] | None = None, *, gates: bool = False, texts: bool = False, rows: int | None = None
    ) -> Iterator[Block]:
        """The rows in order, in blocks of whole sequences.

        Args:
            layers: whose routing to read; all by default.
            gates, texts: whether to read these as well.
            rows: about the most rows of a block; by default as many as make 64 MiB of `active_LTE`, at most 65,536.
        """
        layers = range(self.about.layers) if layers is None else layers
        names = ["sequence", "domain", "token", "loss"] + ["text"] * texts
        for layer in layers:
            names += [f"experts_{layer}"] + [f"gates_{layer}"] * (gates and self.about.gates)
        rows = rows or max(1, min(BLOCK_ROWS, BLOCK_TRIPLES // max(1, len(layers) * self.about.experts)))
        pending: list[pa.RecordBatch] = []  # of one sequence, whose end has not been read
        try:
            for batch in self.file.iter_batches(rows, columns=names):
                sequence_T = batch.column("sequence").to_numpy()
                changes = np.flatnonzero(sequence_T[1:] != sequence_T[:-1])
                cut = int(changes[-1]) + 1 if len(changes) else 0  # where the last sequence of the batch begins
                goes_on = bool(pending) and pending[0].column("sequence")[0].as_py() == sequence_T[0]
                if cut or (pending and not goes_on):
                    yield self._block([*pending, batch.slice(0, cut)], layers, gates, texts)
                    pending = []
                pending.append(batch.slice(cut))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.name}: damaged: {' '.join(str(error).split())[:300]}") from error
        if pending:
            yield self._block(pending, layers, gates, texts)

    def whole(self, *, gates: bool = False, texts: bool = False) -> Block:
        """All rows and layers as one block, which takes memory in proportion to them."""
        table = self.file.read()
        return self._block(table.to_batches(), range(self.about.layers), gates, texts)

    def _block(self, batches: list[pa.RecordBatch], layers: Sequence[int], gates: bool, texts: bool) -> Block:
        table = pa.Table.from_batches(batches).combine_chunks()
        T, E = len(table), self.about.experts
        index = {name: i for i, name in enumerate(self.about.domains)}
        domains = table.column("domain").combine_chunks().dictionary_encode()
        of_name = np.array([index[name] for name in domains.dictionary.to_pylist()], dtype=np.int64)
        active_LTE = torch.zeros(len(layers), T, E, dtype=torch.bool)
        known = gates and self.about.gates
        gate_LTE = torch.zeros(len(layers), T, E) if known else None
        for i, layer in enumerate(layers):
            experts = table.column(f"experts_{layer}").combine_chunks()
            count_T = torch.from_numpy(np.diff(experts.offsets.to_numpy()).astype(np.int64))
            row_P = torch.arange(T).repeat_interleave(count_T)
            expert_P = torch.from_numpy(experts.flatten().to_numpy(zero_copy_only=False).astype(np.int64))
            active_LTE[i, row_P, expert_P] = True
            if gate_LTE is not None:
                gates_P = table.column(f"gates_{layer}").combine_chunks().flatten()
                gate_LTE[i, row_P, expert_P] = torch.from_numpy(gates_P.to_numpy(zero_copy_only=False).copy())

        def numbers(name: str, missing: float) -> np.ndarray:
            return table.column(name).fill_null(missing).to_numpy().copy()

        return Block(
            torch.from_numpy(numbers("sequence", 0)),
            torch.from_numpy(of_name[domains.indices.to_numpy()]),
            torch.from_numpy(numbers("token", UNKNOWN).astype(np.int64)),
            torch.from_numpy(numbers("loss", float("nan"))),
            active_LTE,
            gate_LTE,
            table.column("text").to_pylist() if texts else None,
        )


def is_record(path: str | Path) -> bool:
    """Whether a path is a Parquet file, as records are."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"
