"""Which names of a server in a request's header are its own."""

import socket

import pytest

from remoe.lab.hosts import is_own_host


@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0", "model.example"])
def test_only_own_names_are_accepted(listening):
    own = {"127.0.0.1", "localhost:8000", "LocalHost", "[::1]:8000", "[::1]"}
    named = {"Model.example:8000", "model.example"}
    any_address = {"192.168.1.7:8000", "[fe80::1]:8000", socket.gethostname()}
    others = {"", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"}
    accepted = {header for header in own | named | any_address | others if is_own_host(header, listening)}
    assert accepted == own | {"model.example": named, "0.0.0.0": any_address}.get(listening, set())
