"""`--mesh`: over how many processes a model is spread, and in which way. No torch import: `remoe plan` is quick."""

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from remoe.errors import ConfigError, check, check_choice

if TYPE_CHECKING:
    from remoe.lab.training.config import TrainConfig


@dataclass(frozen=True)
class Mesh:
    """Sizes of the ways in which a model is spread over processes; all 1 for a single process.

    Attributes:
        replicate: copies of the model.
        fsdp: processes over which the weights of a copy are sharded.
        ep: processes among which the experts of a copy are divided; a multiple of tp and a divisor of fsdp * tp.
        tp: processes among which each matrix of attention and vocabulary is cut, and with ep = 1 of the experts. They
            read the same data.
    """

    replicate: int = 1
    fsdp: int = 1
    ep: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """The mesh that `--mesh` describes, such as "fsdp=4,ep=2"; ConfigError for what is not understood."""
        known = [field.name for field in fields(cls)]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (piece.strip() for piece in part.partition("="))
            if name not in known:
                raise ConfigError(f"--mesh: unknown size {name!r}; choose of: {', '.join(known)}, as in fsdp=4,ep=2")
            check(name not in sizes, f"--mesh: {name} is given twice")
            check(size.isdecimal() and int(size) >= 1, f"--mesh: {name} must be a whole number of at least 1")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def processes(self) -> int:
        """How many processes it needs."""
        return self.parts * self.tp

    @property
    def parts(self) -> int:
        """Into how many parts, each of other data, a batch is divided."""
        return self.replicate * self.fsdp

    def check(self, config: "TrainConfig") -> None:
        """Raises ConfigError for a run that cannot be spread so, before anything is allocated."""
        from remoe.lab.training.build import VOCAB_MULTIPLE
        from remoe.routing import ROUTERS

        check_choice("router", config.router, ROUTERS)
        model = config.model
        self.check_model(
            config.router,
            routes_pairs=ROUTERS[config.router].routes_pairs,
            experts=config.experts_per_layer,
            heads=model.num_attention_heads,
            groups=model.num_key_value_heads,
            width=(model.intermediate_size or 4 * model.hidden_size) // config.granularity,
            vocabulary=("the multiple to which the vocabulary is padded", VOCAB_MULTIPLE),
        )
        self.check_batch(config.batch_size, config.micro_batch_size)

    def check_model(
        self,
        router: str,
        *,
        routes_pairs: bool,
        experts: int,
        heads: int,
        groups: int,
        width: int,
        vocabulary: tuple[str, int],
    ) -> None:
        """Raises ConfigError for a model that cannot be spread so.

        Args:
            router: its name.
            routes_pairs: whether the router sends tokens to experts.
            experts: of a layer, after the split by granularity.
            heads, groups: attention heads and key-value heads.
            width: F, of one expert.
            vocabulary: a size that tensor parallelism must divide, and its name.
        """
        if self.ep > 1:
            check(self.ep % self.tp == 0, f"--mesh: ep={self.ep} is not a multiple of tp={self.tp}")
            ranks = self.fsdp * self.tp
            name = f"fsdp={self.fsdp}" if self.tp == 1 else f"fsdp x tp = {ranks}"
            check(ranks % self.ep == 0, f"--mesh: ep={self.ep} does not divide {name}")
        check(experts % self.ep == 0, f"--mesh: ep={self.ep} does not divide the {experts} experts of a layer")
        check(
            self.ep == 1 or routes_pairs,
            f"--mesh: router {router!r} does not send tokens to experts, so these cannot be divided (ep=1)",
        )
        cut = {"the number of attention heads": heads, "the number of key-value heads": groups}
        if self.ep == 1:
            cut["the width of an expert"] = width
        cut[vocabulary[0]] = vocabulary[1]
        for name, size in cut.items():
            check(size % self.tp == 0, f"--mesh: tp={self.tp} does not divide {name}, {size}")

    def check_batch(self, batch_size: int, micro_batch_size: int) -> None:
        """Raises ConfigError for a batch that cannot be divided into equal micro-batches of all processes."""
        check(
            batch_size % self.parts == 0,
            f"--mesh: {self.parts} parts (replicate x fsdp) do not divide --batch-size {batch_size}",
        )
        rows = batch_size // self.parts
        micro = min(micro_batch_size, rows)
        check(
            rows % micro == 0,
            f"--micro-batch-size {micro} does not divide the {rows} sequences that each process has of a batch",
        )


def mesh_of(config: "TrainConfig") -> Mesh:
    """The mesh of a run, checked; ConfigError unless as many processes were started as it needs."""
    mesh, started = Mesh() if config.mesh is None else Mesh.parse(config.mesh), int(os.environ.get("WORLD_SIZE", 1))
    if config.mesh is None:
        check(started == 1, f"{started} processes were started: say with --mesh how, for example fsdp={started}")
        return mesh
    check(
        mesh.processes == started,
        f"--mesh {config.mesh} needs {mesh.processes} processes, but {started} were started: "
        f"torchrun --nproc-per-node {mesh.processes} -m remoe train ...",
    )
    if mesh.processes > 1:
        mesh.check(config)
    return mesh
