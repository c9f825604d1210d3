"""The server of the live page: on 127.0.0.1, with Python's own HTTP server; the page asks for what is new."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from remoe.lab.hosts import is_own_host
from remoe.lab.live.growth import Growth

ADDRESS, PORT = "127.0.0.1", 8765
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class LiveServer(ThreadingHTTPServer):
    """Serves a run's page.

    Args:
        growth: the run.
        port: to listen on; another free one if it is taken, and any free one for 0.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, growth: Growth, port: int = PORT) -> None:
        self.growth, self.lock = growth, threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError:
            super().__init__((ADDRESS, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a page that was closed before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not is_own_host(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this page is served to 127.0.0.1 alone\n")
        elif url.path in _FILES:
            name, kind = _FILES[url.path]
            self._send(HTTPStatus.OK, kind, files("remoe.lab.live").joinpath(name).read_bytes())
        elif url.path == "/data":
            asked = parse_qs(url.query)
            with self.server.lock:
                answer = self.server.growth.answer(_whole(asked, "epoch"), _whole(asked, "after"))
            self._send(HTTPStatus.OK, "application/json", json.dumps(answer, allow_nan=False).encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the terminal for the run's own lines."""


def _whole(asked: dict[str, list[str]], name: str) -> int:
    """A number of the query; 0 if it is missing or none."""
    given = asked.get(name, ["0"])[0]
    return int(given) if given.isascii() and given.isdigit() and len(given) < 16 else 0


@contextmanager
def serving(growth: Growth, port: int = PORT) -> Iterator[str]:
    """Context in which a thread serves the page; gives its address."""
    server = LiveServer(growth, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
