"""An application in front of transformers' server: is a request meant for it, and does its client still wait?"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from remoe.lab.hosts import is_own_host

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

REQUEST_ID = b"x-request-id"


class Gate:
    """ASGI application that refuses requests for another host, and ends those whose client has gone away.

    Args:
        app: transformers' server.
        host: the address on which it listens.
        running: by id of the request, what stops its generation; the managers add to it.
    """

    def __init__(self, app: App, host: str, running: dict[str, Callable[[], None]]) -> None:
        self.app, self.host, self.running = app, host, running

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._is_ours(dict(scope["headers"])):
            await self._answer(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"the request names another host than this server\n"})

    def _is_ours(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request is for this server and, if a page in a browser makes it, from a page of this server."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        return is_own_host(host, self.host) and (not origin or is_own_host(origin.partition("://")[2], self.host))

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        # Ours, because continuous batching mixes up, and stops at, two requests to which clients gave one id.
        request_id = str(uuid.uuid4())
        headers = [pair for pair in scope["headers"] if pair[0] != REQUEST_ID]
        headers.append((REQUEST_ID, request_id.encode()))
        received: asyncio.Queue[Message] = asyncio.Queue()
        complete = gone = False

        async def listen() -> None:
            nonlocal gone
            while not gone:
                message = await receive()
                received.put_nowait(message)
                gone = message["type"] == "http.disconnect"
            if not complete:
                answering.cancel()

        async def send_on(message: Message) -> None:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        answering = asyncio.ensure_future(self.app({**scope, "headers": headers}, received.get, send_on))
        listening = asyncio.ensure_future(listen())
        try:
            await answering
        except asyncio.CancelledError:
            if not gone:  # the server is ending
                raise
        finally:
            listening.cancel()
            stop = self.running.pop(request_id, None)
            if stop is not None and not complete:
                stop()
