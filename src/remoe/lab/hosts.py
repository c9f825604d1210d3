"""The names by which requests may address a server of this machine."""

import ipaddress
import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_own_host(header: str, listening: str = LOOPBACK[0]) -> bool:
    """Whether a request's Host names this server, whatever the port, which a tunnel may change.

    A page of another site can make its own name point to this machine (DNS rebinding). The browser then lets the page
    read the answers; only the name in the header still tells that they are meant for another site.

    Args:
        header: value of the header Host; empty if there is none.
        listening: the address on which the server listens. One that stands for all addresses of the machine allows
            any address, but no name other than localhost and the machine's own.
    """
    name = header.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name in LOOPBACK or name == listening.lower():
        return True
    return listening in ("0.0.0.0", "::") and (name == socket.gethostname().lower() or _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
