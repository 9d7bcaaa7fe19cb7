"""The state of one request while it is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from posttrain.engines.base import Aborted, RefusedRequest, RequestUpdate
from posttrain.models.text import text_of
from posttrain.seeds import seeds_of
from posttrain.serving.errors import ApiError, server_error
from posttrain.serving.prompts import sampling_for
from posttrain.serving.replies import Choice, GenerationRequest, Writer
from posttrain.serving.routing import Served
from posttrain.serving.text import TextStream
from posttrain.serving.worker import Job


class Answer:
    """The jobs of a request and their results so far. The request has a slot, which :meth:`close` releases.

    Raises:
        ApiError: if the request cannot be sampled.
    """

    def __init__(self, served: Served, request: GenerationRequest, prompts: Sequence[list[int]]) -> None:
        self._served, self._request, self._prompts = served, request, prompts
        decode, decode_all = text_of(served.tokenizer), text_of(served.tokenizer, special=True)
        self._writer = Writer(request, lambda token: decode_all([token]))
        self._updates: asyncio.Queue[tuple[int, RequestUpdate]] = asyncio.Queue()
        self.choices = [
            Choice(i * request.n + j, prompt, TextStream(decode, request.stop or ()))
            for i, prompt in enumerate(prompts)
            for j in range(request.n)
        ]
        self._jobs = self._make_jobs()
        self._closed = False

    def _make_jobs(self) -> list[Job]:
        served, request = self._served, self._request
        sampling = sampling_for(request, served.sampling, self._prompts, served.engine.max_model_len)
        decoder, strength = served.route(request.guide, sampling)
        (seed,) = served.seeds.unless(None if request.seed is None else [request.seed], 1)
        loop = asyncio.get_running_loop()

        def on_update(first: int, sample: int, update: RequestUpdate) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._updates.put_nowait, (first + sample, update))

        settings = {
            "sampling": sampling,
            "n": request.n,
            "decoder": decoder,
            "strength": strength,
            "stream": request.stream or bool(request.stop),  # a stop string ends the sampling too
        }
        seeds = seeds_of(seed, len(self._prompts))
        return [
            Job(prompt=prompt, seed=prompt_seed, on_update=partial(on_update, place * request.n), **settings)
            for place, (prompt, prompt_seed) in enumerate(zip(self._prompts, seeds, strict=True))
        ]

    def start(self) -> None:
        """Submits the jobs to the worker."""
        for job in self._jobs:
            self._served.worker.submit(job)

    async def whole(self) -> dict[str, Any]:
        """Waits until all choices have ended, and returns the whole answer."""
        async for _ in self._grown():
            pass
        return self._writer.whole(self.choices, self._prompts)

    async def events(self) -> AsyncIterator[str]:
        """Streams the answer as server-sent events."""
        for choice in self.choices:
            if (first := self._writer.first(choice)) is not None:
                yield event(first)
        every_token = self._request.wants_logps or self._request.return_token_ids
        try:
            async for choice in self._grown():
                if choice.piece or choice.finish or every_token:
                    yield event(self._writer.piece(choice))
                    choice.sent()
        except ApiError as error:
            yield event(error.body)
        except Exception as error:  # the response has begun, so the client learns of it in the stream alone
            yield event(server_error(error).body)
        else:
            if self._request.stream_options is not None and self._request.stream_options.include_usage:
                yield event(self._writer.last(self.choices, self._prompts))
        yield "data: [DONE]\n\n"

    async def _grown(self) -> AsyncIterator[Choice]:
        """Yields choices that have new tokens, until all have ended."""
        unfinished = len(self.choices)
        while unfinished:
            index, update = await self._updates.get()
            choice = self.choices[index]
            if choice.finish is not None:
                continue  # tokens after a stop string
            if update.error is not None:
                raise _api_error(update.error)
            choice.take(update)
            if choice.finish is not None:
                unfinished -= 1
                if not update.ended:
                    place, sample = divmod(index, self._request.n)
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
    """Formats a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, Aborted):
        return ApiError(503, "the server stopped sampling before this request was answered", code="aborted")
    if isinstance(error, RefusedRequest):
        return ApiError(400, str(error), code="invalid_value")
    return server_error(error)
