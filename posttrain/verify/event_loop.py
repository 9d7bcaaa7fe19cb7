"""Runs async verifiers concurrently in one event loop, in a thread of this process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from posttrain.system.interrupts import uninterrupted
from posttrain.verify.worker import Failed, describe

GRACE = 5.0  # seconds that a loop may take to answer before it counts as blocked


class EventLoop:
    """Runs coroutines concurrently, each with a time limit that counts from its start.

    Args:
        concurrent: number of coroutines that run at the same time.
    """

    def __init__(self, concurrent: int = 128) -> None:
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(concurrent)
        self._thread = threading.Thread(target=self._loop.run_forever, name="async-verifiers", daemon=True)
        self._thread.start()
        self.blocked = False

    def submit(self, call: Callable[[], Awaitable[Any]], limit: float) -> Future[Any]:
        """Starts a call and returns the future of its value, of a :class:`Failed`, or of ``TimeoutError``."""
        with uninterrupted():
            return asyncio.run_coroutine_threadsafe(self._run(call, limit), self._loop)

    async def _run(self, call: Callable[[], Awaitable[Any]], limit: float) -> Any | Failed:
        async with self._slots:
            clock = asyncio.timeout(limit)
            try:
                async with clock:
                    return await call()
            except (Exception, SystemExit) as error:
                if clock.expired():
                    raise
                return describe(error)

    def wait(self, future: Future[Any], limit: float) -> Any:
        """Waits for a future of this loop and returns its result.

        Raises:
            TimeoutError: if the call ran out of time, or if a call blocks the loop's thread instead of awaiting,
                so that no limit can reach it.
        """
        while not future.done() and not self.blocked:
            concurrent.futures.wait([future], timeout=limit + GRACE)
            self.blocked = not (future.done() or self._answers())
        if self.blocked and not future.done():
            raise TimeoutError
        return future.result()

    def _answers(self) -> bool:
        answer: Future[None] = Future()
        self._loop.call_soon_threadsafe(answer.set_result, None)
        return bool(concurrent.futures.wait([answer], timeout=GRACE).done)

    def close(self) -> None:
        """Cancels all calls that still run."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(timeout=2)  # a coroutine that blocks the thread cannot be stopped; the thread is a daemon

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)
