"""The endpoints of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from posttrain.serving.answer import Run
from posttrain.serving.errors import ApiError, of_failure, of_validation
from posttrain.serving.prompts import chat_prompt, completion_prompts
from posttrain.serving.protocol import ChatRequest, CompletionRequest, ValuesRequest
from posttrain.serving.replies import Asked
from posttrain.serving.routing import Served
from posttrain.serving.value_endpoint import prefix_values

CLIENT_GONE = 499
T = TypeVar("T")


class EventStream(StreamingResponse):
    """A response of server-sent events. The request ends with the connection, however that ends."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()


class ClientGone(Exception):
    """The error for a client that has disconnected."""


def make_app(served: Served) -> FastAPI:
    """Makes the application. It starts and ends the worker."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        await asyncio.to_thread(served.worker.close)

    app = FastAPI(title="posttrain", lifespan=lifespan)
    created = int(time.time())
    _tell_errors(app)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if served.worker.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(served, created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_model(name)
        return _card(served, created)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        served.check_model(asked.model)
        return await _answered(served, asked, completion_prompts(asked, served.tokenizer), http)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, http: Request) -> Response:
        served.check_model(asked.model)
        return await _answered(served, asked, [chat_prompt(asked, served.tokenizer)], http)

    @app.post("/v1/values")
    async def values(asked: ValuesRequest) -> dict[str, Any]:
        served.check_model(asked.model)
        await served.limit.enter()
        try:
            return await prefix_values(served, asked)
        finally:
            served.limit.leave()

    return app


def _card(served: Served, created: int) -> dict[str, Any]:
    guide = None if served.decoder is served.engine else type(served.decoder).__name__.lower()
    length = served.engine.max_model_len
    own = {"max_model_len": length, "guide": guide, "version": served.decoder.version}
    return {"id": served.name, "object": "model", "created": created, "owned_by": "posttrain", **own}


async def _answered(served: Served, asked: Asked, prompts: Sequence[list[int]], http: Request) -> Response:
    run = Run(served, asked, prompts)
    try:
        await _unless_gone(http, served.limit.enter())
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    run.start()
    if asked.stream:
        return EventStream(run)
    try:
        return JSONResponse(await _unless_gone(http, run.whole()))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    finally:
        run.close()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work``, and cancels it if the client disconnects.

    Raises:
        ClientGone: if it does.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _tell_errors(app: FastAPI) -> None:
    """Installs handlers that answer all errors in OpenAI's format."""

    def handler(make: Callable[[Any], ApiError]) -> Callable[[Request, Any], Awaitable[Response]]:
        async def answer(http: Request, error: Any) -> Response:
            told = make(error)
            headers = {} if told.retry_after is None else {"Retry-After": str(told.retry_after)}
            return JSONResponse(told.body, told.status, headers)

        return answer

    app.exception_handler(ApiError)(handler(lambda error: error))
    app.exception_handler(RequestValidationError)(handler(lambda error: of_validation(error.errors())))
    app.exception_handler(HTTPException)(handler(lambda error: ApiError(error.status_code, str(error.detail))))
    app.exception_handler(Exception)(handler(of_failure))
