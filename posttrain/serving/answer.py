"""The state of one request while it is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from posttrain.engines.base import Aborted, RequestUpdate
from posttrain.seeds import seeds_of
from posttrain.serving.errors import ApiError, of_failure
from posttrain.serving.prompts import sampling_for
from posttrain.serving.replies import Asked, Choice, Writer
from posttrain.serving.routing import Served
from posttrain.serving.text import TextStream
from posttrain.serving.worker import Job


class Run:
    """The jobs of a request and their results so far. The request holds a slot, which :meth:`close` releases.

    Raises:
        ApiError: for what cannot be sampled.
    """

    def __init__(self, served: Served, asked: Asked, prompts: Sequence[list[int]]) -> None:
        self._served, self._asked, self._prompts = served, asked, prompts
        tokenizer = served.tokenizer

        def decode(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

        self._writer = Writer(asked, lambda token: str(tokenizer.decode([token])))
        self._news: asyncio.Queue[tuple[int, RequestUpdate]] = asyncio.Queue()
        self.choices = [
            Choice(i * asked.n + j, prompt, TextStream(decode, asked.stop or ()))
            for i, prompt in enumerate(prompts)
            for j in range(asked.n)
        ]
        self._jobs = self._made()
        self._closed = False

    def _made(self) -> list[Job]:
        served, asked = self._served, self._asked
        sampling = sampling_for(asked, served.sampling, self._prompts, served.engine.max_model_len)
        decoder, strength = served.route(asked.guide, sampling)
        (seed,) = served.seeds.unless(None if asked.seed is None else [asked.seed], 1)
        loop = asyncio.get_running_loop()

        def on_update(first: int, sample: int, update: RequestUpdate) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._news.put_nowait, (first + sample, update))

        terms = {
            "sampling": sampling,
            "n": asked.n,
            "decoder": decoder,
            "strength": strength,
            "stream": asked.stream or bool(asked.stop),  # a stop string ends the sampling, too
        }
        seeds = seeds_of(seed, len(self._prompts))
        return [
            Job(prompt=prompt, seed=own, on_update=partial(on_update, place * asked.n), **terms)
            for place, (prompt, own) in enumerate(zip(self._prompts, seeds, strict=True))
        ]

    def start(self) -> None:
        """Submits the jobs to the worker."""
        for job in self._jobs:
            self._served.worker.submit(job)

    async def whole(self) -> dict[str, Any]:
        """The whole answer, once all choices have ended."""
        async for _ in self._grown():
            pass
        return self._writer.whole(self.choices, self._prompts)

    async def events(self) -> AsyncIterator[str]:
        """Streams the answer as server-sent events."""
        for choice in self.choices:
            if (first := self._writer.first(choice)) is not None:
                yield event(first)
        every_token = self._asked.wants_logps or self._asked.return_token_ids
        try:
            async for choice in self._grown():
                if choice.piece or choice.finish or every_token:
                    yield event(self._writer.piece(choice))
                    choice.sent()
        except ApiError as error:
            yield event(error.body)
        else:
            if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
                yield event(self._writer.last(self.choices, self._prompts))
        yield "data: [DONE]\n\n"

    async def _grown(self) -> AsyncIterator[Choice]:
        """Yields choices that have new tokens, until all have ended."""
        unfinished = len(self.choices)
        while unfinished:
            index, update = await self._news.get()
            choice = self.choices[index]
            if choice.finish is not None:
                continue  # what came after a stop string
            if update.error is not None:
                raise _told(update.error)
            choice.take(update)
            if choice.finish is not None:
                unfinished -= 1
                if not update.ended:
                    place, sample = divmod(index, self._asked.n)
                    self._served.worker.cancel(self._jobs[place], sample)
            yield choice

    def close(self) -> None:
        """Cancels jobs that still run, and releases the slot."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs:
            self._served.worker.cancel(job)
        self._served.limit.leave()


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _told(error: Exception) -> ApiError:
    if isinstance(error, Aborted):
        return ApiError(503, "the server stopped sampling before this request was answered", code="aborted")
    return of_failure(error)
