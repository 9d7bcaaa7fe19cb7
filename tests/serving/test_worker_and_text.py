"""Tests of the worker thread, of text that arrives token by token, and of request bodies."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from exact_world import PROMPT, make_world
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from served import MESSAGES

from posttrain.engines.base import RequestUpdate
from posttrain.engines.stepping import SteppingEngine
from posttrain.serving.errors import ApiError
from posttrain.serving.protocol import ChatRequest, CompletionRequest
from posttrain.serving.text import TextStream
from posttrain.serving.worker import Job, Worker

# ------------------------------------------------------------------------------------------------------- the worker


def test_a_closed_worker_ends_all_jobs():
    world = make_world()
    worker = Worker(engine := world.engine())
    updates: list[RequestUpdate] = []
    done = threading.Event()

    def on_update(sample: int, update: RequestUpdate) -> None:
        updates.append(update)
        done.set()

    settings = {"prompt": PROMPT, "sampling": world.sampling, "n": 2, "seed": 0, "on_update": on_update}
    worker.start()
    worker.submit(Job(**settings, decoder=engine))
    assert done.wait(5)
    worker.close()
    expected = engine.generate([PROMPT], world.sampling, 2, seeds=[0])[0]
    assert sorted(p.completion.tokens for p in updates if p.completion) == sorted(c.tokens for c in expected)
    assert not worker.alive


def test_all_jobs_get_the_error_of_the_engine(monkeypatch: pytest.MonkeyPatch):
    world = make_world()
    worker = Worker(engine := world.engine())
    updates: list[RequestUpdate] = []

    def fail(self: SteppingEngine) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(engine), "_advance", fail)
    job = {"prompt": PROMPT, "sampling": world.sampling, "n": 1, "seed": 0, "decoder": engine}
    job["on_update"] = lambda sample, update: updates.append(update)
    worker.submit(Job(**job))
    worker.start()
    until = time.monotonic() + 5
    while not updates and time.monotonic() < until:
        time.sleep(0.01)
    worker.submit(Job(**job))
    worker.close()
    assert len(updates) == 2 and isinstance(updates[1].error, MemoryError) and updates[0].ended
    assert not worker.alive


# ------------------------------------------------------------------------------------------------- text and requests


def decode(tokens: Any) -> str:
    return bytes(tokens).decode(errors="replace")


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_pieces_of_text_joined_are_the_text_of_all_tokens(data: bytes):
    stream = TextStream(decode)
    pieces = [stream.add(byte) for byte in data]
    assert "".join(pieces) + stream.finish() == decode(data)
    assert stream.length == len(decode(data))


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_a_stop_string(text: str, stop: str):
    stream, shown = TextStream(decode, [stop]), ""
    for byte in text.encode():
        if not stream.stopped:
            shown += stream.add(byte)
    assert shown + stream.finish() == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


def test_text_that_might_begin_a_stop_string_is_held_back():
    stream = TextStream(decode, ["END", "\n\n"])
    assert [stream.add(byte) for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert stream.finish() == "EN" and not stream.stopped


def test_request_bodies_are_those_of_openai():
    request = CompletionRequest(model="m", prompt=[[1, 2], [3]], stop="x", guide={"lambda": 2})  # type: ignore[arg-type]
    assert request.stop == ["x"] and request.guide.strength == 2.0  # type: ignore[union-attr]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 7}
    )
    assert chat.messages[0].for_template == {"role": "user", "content": parts} and chat.max_tokens == 7


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tools": [{}]},
        {"response_format": {"type": "json_object"}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_unsupported_settings_of_a_chat_are_refused(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"model": "m", "messages": MESSAGES} | change)


def test_an_error_has_openais_keys():
    body = ApiError(429, "full", code="rate_limit_exceeded").body
    assert json.loads(json.dumps(body)) == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    }
