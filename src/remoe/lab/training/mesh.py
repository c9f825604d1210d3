"""`--mesh`: over how many processes a model is spread, and in which way."""

import os
from dataclasses import dataclass, fields

from remoe.errors import ConfigError, check, check_choice
from remoe.lab.training.config import TrainConfig
from remoe.routing import ROUTERS


@dataclass(frozen=True)
class Mesh:
    """Sizes of the ways in which a model is spread over processes; all 1 for a single process.

    Attributes:
        replicate: copies of the model.
        fsdp: processes over which the weights of a copy are sharded.
        ep: processes among which the experts of a copy are divided; a divisor of fsdp.
    """

    replicate: int = 1
    fsdp: int = 1
    ep: int = 1

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """The mesh that `--mesh` describes, such as "fsdp=4,ep=2"; ConfigError for what is not understood."""
        known = [field.name for field in fields(cls)]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (piece.strip() for piece in part.partition("="))
            check(name != "tp" or size == "1", "--mesh: tensor parallelism (tp) is not supported in training yet")
            if name == "tp":
                continue
            if name not in known:
                raise ConfigError(f"--mesh: unknown size {name!r}; choose of: {', '.join(known)}, as in fsdp=4,ep=2")
            check(name not in sizes, f"--mesh: {name} is given twice")
            check(size.isdecimal() and int(size) >= 1, f"--mesh: {name} must be a whole number of at least 1")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def processes(self) -> int:
        """How many processes it needs; each reads other data."""
        return self.replicate * self.fsdp

    def check(self, config: TrainConfig) -> None:
        """Raises ConfigError for a run that cannot be spread so, before anything is allocated."""
        check_choice("router", config.router, ROUTERS)
        router, E = ROUTERS[config.router], config.experts_per_layer
        check(self.fsdp % self.ep == 0, f"--mesh: ep={self.ep} does not divide fsdp={self.fsdp}")
        check(E % self.ep == 0, f"--mesh: ep={self.ep} does not divide the {E} experts of a layer")
        check(
            self.ep == 1 or router.routes_pairs,
            f"--mesh: router {config.router!r} does not send tokens to experts, so these cannot be divided (ep=1)",
        )
        check(
            config.batch_size % self.processes == 0,
            f"--mesh: {self.processes} processes do not divide --batch-size {config.batch_size}",
        )
        rows = config.batch_size // self.processes
        micro = min(config.micro_batch_size, rows)
        check(
            rows % micro == 0,
            f"--micro-batch-size {micro} does not divide the {rows} sequences that each process has of a batch",
        )
        check(not config.compile, "--mesh: a model that is spread over processes cannot be compiled yet")


def mesh_of(config: TrainConfig) -> Mesh:
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
