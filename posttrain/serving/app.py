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

from posttrain.serving.answer import Answer
from posttrain.serving.body_limit import BodyLimit
from posttrain.serving.errors import ApiError, server_error, validation_error
from posttrain.serving.limits import check_choices
from posttrain.serving.prompts import chat_prompt, completion_prompts
from posttrain.serving.protocol import ChatRequest, CompletionRequest, ValuesRequest
from posttrain.serving.replies import GenerationRequest
from posttrain.serving.routing import Served
from posttrain.serving.value_endpoint import prefix_values

CLIENT_GONE = 499
MAX_BODY = 4 * 2**20
"""Default of the most bytes of a body."""
T = TypeVar("T")


class EventStream(StreamingResponse):
    """A response of server-sent events. The request ends when the connection ends, for whatever reason."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class ClientGone(Exception):
    """The error for a client that has disconnected."""


def make_app(served: Served, *, max_body: int = MAX_BODY) -> FastAPI:
    """Makes the application, which starts and ends the worker.

    Args:
        max_body: most bytes of a request's body.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        await asyncio.to_thread(served.worker.close)

    app = FastAPI(title="posttrain", lifespan=lifespan)
    created = int(time.time())
    app.add_middleware(BodyLimit, most=max_body)
    _install_error_handlers(app)

    @app.get("/health")
    async def health() -> Response:
        if served.worker.alive:
            return Response(status_code=200)
        failure = served.worker.broken
        reason = "the engine is not running" if failure is None else f"the engine failed: {failure!r}"
        return JSONResponse(ApiError(503, reason, code="engine_failed").body, 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(served, created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_model(name)
        return _card(served, created)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        served.check_model(request.model)
        served.check_texts(request.prompt, "prompt")
        prompts = await asyncio.to_thread(completion_prompts, request, served.tokenizer)
        check_choices(len(prompts), request.n)
        return await _answered(served, request, prompts, http)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        served.check_model(request.model)
        served.check_texts(request.texts, "messages")
        prompt = await asyncio.to_thread(chat_prompt, request, served.tokenizer)
        return await _answered(served, request, [prompt], http)

    @app.post("/v1/values")
    async def values(request: ValuesRequest, http: Request) -> Response:
        served.check_model(request.model)
        return await _values(served, request, http)

    return app


async def _values(served: Served, request: ValuesRequest, http: Request) -> Response:
    """Answers a request for values as soon as one of the places is free."""
    try:
        await _unless_gone(http, served.limit.enter())
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    try:
        return JSONResponse(await _unless_gone(http, prefix_values(served, request)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    finally:
        served.limit.leave()


def _card(served: Served, created: int) -> dict[str, Any]:
    guide = None if served.decoder is served.engine else type(served.decoder).__name__.lower()
    length = served.engine.max_model_len
    settings = {"max_model_len": length, "guide": guide, "version": served.decoder.version}
    return {"id": served.name, "object": "model", "created": created, "owned_by": "posttrain", **settings}


async def _answered(
    served: Served, request: GenerationRequest, prompts: Sequence[list[int]], http: Request
) -> Response:
    answer = Answer(served, request, prompts)
    try:
        await _unless_gone(http, served.limit.enter())
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    answer.start()
    if request.stream:
        return EventStream(answer)
    try:
        return JSONResponse(await _unless_gone(http, answer.whole()))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    finally:
        answer.close()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work``, and cancels it if the client disconnects.

    Raises:
        ClientGone: if the client disconnects.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _install_error_handlers(app: FastAPI) -> None:
    """Installs handlers that answer all errors in OpenAI's format."""

    def handler(make: Callable[[Any], ApiError]) -> Callable[[Request, Any], Awaitable[Response]]:
        async def answer(http: Request, error: Any) -> Response:
            api_error = make(error)
            headers = {} if api_error.retry_after is None else {"Retry-After": str(api_error.retry_after)}
            return JSONResponse(api_error.body, api_error.status, headers)

        return answer

    app.exception_handler(ApiError)(handler(lambda error: error))
    app.exception_handler(RequestValidationError)(handler(lambda error: validation_error(error.errors())))
    app.exception_handler(HTTPException)(handler(lambda error: ApiError(error.status_code, str(error.detail))))
    app.exception_handler(Exception)(handler(server_error))
