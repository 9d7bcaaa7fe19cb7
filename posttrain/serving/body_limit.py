"""Reads the bodies of requests before the endpoints do, and refuses those that are too long or too slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from posttrain.serving.errors import ApiError

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]

PATIENCE = 30.0
"""Seconds until a body must have arrived."""

DISCARDED = 64 * 2**20
"""Most bytes of a body that are read and thrown away, so that a client that still writes can read the answer."""


class BodyLimit:
    """An ASGI application around another one, which gets only bodies of at most ``most`` bytes."""

    def __init__(self, app: Any, *, most: int, patience: float = PATIENCE) -> None:
        self._app, self._most, self._patience = app, most, patience

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_read(receive, self._most), self._patience)
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {self._patience:g} seconds", code="timeout")
            await JSONResponse(error.body, error.status, {"Connection": "close"})(scope, receive, send)
        except ApiError as error:
            await JSONResponse(error.body, error.status, {"Connection": "close"})(scope, receive, send)
        else:
            if body is not None:  # else the client has gone
                await self._app(scope, _replayed(body, receive), send)


async def _read(receive: Receive, most: int) -> bytes | None:
    """Reads a body; None if the client disconnects before its end.

    Raises:
        ApiError: if the body is too long.
    """
    chunks, size, more = [], 0, True
    while more and size <= max(most, DISCARDED):
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        chunk, more = event.get("body", b""), event.get("more_body", False)
        size += len(chunk)
        chunks = [*chunks, chunk] if size <= most else []
    if size > most:
        message = f"the body is longer than {most} bytes (server.max_body_mb in the server's recipe)"
        raise ApiError(413, message, code="body_too_long")
    return b"".join(chunks)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Makes a function that gives the body first, and then what ``receive`` gives."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_event() -> Event:
        return events.pop() if events else await receive()

    return next_event
