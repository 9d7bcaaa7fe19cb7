"""Limits on the requests that run and that wait; further ones are refused."""

from __future__ import annotations

import asyncio

from posttrain.serving.errors import ApiError


class Limit:
    """Lets requests in, first come first served.

    Args:
        requests: number of requests that run at the same time.
        queue: number of requests that may wait for a slot.
    """

    def __init__(self, requests: int, queue: int) -> None:
        self._slots, self._queue = asyncio.Semaphore(requests), queue
        self.waiting = 0

    async def enter(self) -> None:
        """Waits for a slot, which :meth:`leave` releases.

        Raises:
            ApiError: 429 if too many wait already.
        """
        if self._slots.locked() and self.waiting >= self._queue:
            message = f"the server is full: {self.waiting} requests wait. Try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=1)
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        """Releases the slot."""
        self._slots.release()
