"""`remoe serve`."""

import threading
from dataclasses import dataclass
from typing import Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import importing, parse

PROG = "remoe serve"


@dataclass
class ServeOptions:
    """Serve a model by OpenAI's API, with the server of transformers 5.24 (extra `serve`).

    The name of the model is that of its folder. Ctrl-C ends the command.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run (its newest checkpoint is used), one of its checkpoints, or the folder of any transformers
    language model with its tokenizer."""
    port: int = 8000
    """Port to listen on; if it is taken, another that is free."""
    host: str = "127.0.0.1"
    """Address to listen on: the default is reached from this machine alone, and there is no password."""
    continuous_batching: bool = False
    """Compute concurrent requests together, with transformers' paged attention; by default one after the other."""
    gate_threshold: float | None = None
    """Leave out experts whose gate is at most this; a request can say otherwise (`gate_threshold`)."""
    max_experts: int | None = None
    """Execute at most so many experts per token; a request can say otherwise (`max_experts`)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def serve_command(argv: list[str]) -> int:
    """Answers requests until a signal ends the command."""
    options = parse(ServeOptions, argv, prog=PROG)
    if not 0 <= options.port < 1 << 16:
        raise ConfigError(f"--port must be between 0 and 65535, but is {options.port}")

    with importing():
        from remoe.lab.machine import pick_device
        from remoe.lab.serving.server import serving

    with serving(
        options.folder,
        host=options.host,
        port=options.port,
        continuous_batching=options.continuous_batching,
        device=pick_device(options.device),
        gate_threshold=options.gate_threshold,
        max_experts=options.max_experts,
    ) as (url, name):
        taken = options.port and f":{options.port}/" not in url
        print(f"serving      {url}" + (f"  (port {options.port} is taken)" if taken else ""))
        print(f"model        {name}")
        print("Ctrl-C ends this command", flush=True)
        threading.Event().wait()
    return 0
