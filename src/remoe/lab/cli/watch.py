"""`remoe watch`."""

import threading
from dataclasses import dataclass
from typing import Annotated

import tyro

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import importing, parse

PROG = "remoe watch"


@dataclass
class WatchOptions:
    """Show a run in a browser while it trains: loss, sparsity, lambda, throughput and the load of each expert.

    The page is served on this machine alone and follows the run without being reloaded. Ctrl-C ends the command, but
    not the run. `remoe train --live` serves the same page.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run: it may be training, stopped or finished."""
    port: int = 8765
    """Port of 127.0.0.1; if it is taken, another that is free."""


def watch_command(argv: list[str]) -> int:
    """Serves the page until a signal ends the command."""
    options = parse(WatchOptions, argv, prog=PROG)
    if not 0 <= options.port < 1 << 16:
        raise ConfigError(f"--port must be between 0 and 65535, but is {options.port}")

    with importing():
        from remoe.lab.live.growth import Growth
        from remoe.lab.live.server import serving
        from remoe.lab.training.folder import RunFolder

    with serving(Growth(RunFolder(options.run)), options.port) as url:
        taken = options.port and f":{options.port}/" not in url
        print(f"live         {url}" + (f"  (port {options.port} is taken)" if taken else ""))
        print("open it in a browser; Ctrl-C ends this command", flush=True)
        threading.Event().wait()
    return 0
